// Blocks of threads on the host, for kernels' own code: a thread for each lane that does something of its own, and
// barriers that count as the hardware's do. Whoever includes this says what is wrong and returns 1, or returns 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __CUDA_ARCH__ 900
using std::min;

constexpr int kLanes = 2;  // of 32: lane 0 and those with the other blocks' numbers arrive at barriers
constexpr int kWarps = 11;
constexpr int kClusterBlocks = 2;
constexpr unsigned kRankShift = 24, kAddress = (1u << kRankShift) - 1;

struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static thread_local std::mt19937 random_numbers;

static void fail(const char* what) {
    std::printf("%s\n", what);
    std::fflush(stdout);
    std::_Exit(1);
}

// Now and then somebody is late, and a cluster's first block is always slow.
static void dawdle() {
    if (random_numbers() % (blockIdx.x % kClusterBlocks ? 8 : 3) == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random_numbers() % 60));
}

// An mbarrier: a phase ends when all have arrived and all bytes have come. It knows no more of phases than their parity.
struct Barrier {
    int count, missing;
    long bytes = 0;
    unsigned phase = 0;
    std::mutex mutex;
    std::condition_variable ended;

    explicit Barrier(int arrivals) : count(arrivals), missing(arrivals) {}

    void change(int arrivals, long more_bytes) {
        const std::lock_guard lock(mutex);
        missing -= arrivals;
        bytes += more_bytes;
        if (missing < 0) fail("more arrive at a barrier than it is for");
        if (missing || bytes) return;
        missing = count;
        ++phase;
        ended.notify_all();
    }

    void wait(unsigned parity) {
        std::unique_lock lock(mutex);
        if (!ended.wait_for(lock, std::chrono::seconds(5), [&] { return phase % 2 != parity; }))
            fail("blocks wait for each other for ever");
    }
};

// A block's barriers and, per warp, where its lanes meet.
struct Block {
    std::map<unsigned, std::unique_ptr<Barrier>> barriers;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<unsigned char> sums;  // that other blocks send
    unsigned sums_begin = 0;
    std::atomic<int> num_gone = 0;  // lanes

    Block() {
        for (int i = 0; i < kWarps; ++i) warps.push_back(std::make_unique<std::barrier<>>(kLanes));
    }
    Barrier& at(unsigned barrier) { return *barriers.at(barrier & kAddress); }
};
static std::vector<std::unique_ptr<Block>> blocks;

static Block& own_block() { return *blocks[blockIdx.x]; }
static Block& block_at(unsigned address) {
    return *blocks[blockIdx.x / kClusterBlocks * kClusterBlocks + (address >> kRankShift)];
}
static int cluster_rank() { return blockIdx.x % kClusterBlocks; }

// --- what the kernels' code calls ---

static void init_barrier(unsigned barrier, unsigned arrivals) {
    own_block().barriers[barrier] = std::make_unique<Barrier>(arrivals);
}
static void wait_for_phase(unsigned barrier, unsigned parity) {
    dawdle();
    own_block().at(barrier).wait(parity);
}
static void wait_for_cluster_phase(unsigned barrier, unsigned parity) { wait_for_phase(barrier, parity); }
static void arrive(unsigned barrier) { own_block().at(barrier).change(1, 0); }
static void arrive_expecting(unsigned barrier, unsigned bytes) { own_block().at(barrier).change(1, bytes); }
static unsigned address_at_rank(unsigned address, int rank) {
    return address | static_cast<unsigned>(rank) << kRankShift;
}
static Block& present(Block& block) {
    if (block.num_gone == kLanes) fail("a block that has gone is written to");
    return block;
}
static void arrive_at_rank(unsigned barrier, int rank) {
    dawdle();
    const unsigned there = address_at_rank(barrier, rank);
    present(block_at(there)).at(there).change(1, 0);
}
static void publish_shared_writes() {}
static void __syncwarp() { own_block().warps[threadIdx.x / 32]->arrive_and_wait(); }

static unsigned char* sums_at(Block& block, unsigned address) {
    const unsigned place = (address & kAddress) - block.sums_begin;
    if (place % 16 || place + 16 > block.sums.size()) fail("a pack lies outside of the room for sums");
    return &block.sums[place];
}
static void store_at_rank(unsigned to, const float* from, unsigned barrier) {
    dawdle();
    std::memcpy(sums_at(present(block_at(to)), to), from, 16);
    block_at(barrier).at(barrier).change(0, -16 * (32 / kLanes));
}
static void load_shared_floats(float (&to)[4], unsigned from) { std::memcpy(to, sums_at(own_block(), from), 16); }
