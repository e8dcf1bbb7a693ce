// How blocks of a cluster add up in small_linear_tiles, on the host: the kernel's own code, a thread for each lane that
// does something of its own, and barriers that count as the hardware's do. Says what is wrong and returns 1, or
// returns 0.
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
#define __CUDA_ARCH_FEAT_SM90_ALL
using std::min;

constexpr int kLanes = 2;  // of 32: lane 0 and those with the other blocks' numbers arrive at barriers
constexpr int kTiles = 6;
constexpr unsigned kBuffer = 1024, kFull = 8, kEmpty = 16, kRankShift = 24, kAddress = (1u << kRankShift) - 1;

struct Index { int x; };
static thread_local Index threadIdx;
static thread_local int rank_now;
static thread_local std::mt19937 random_numbers;

static void fail(const char* what) {
    std::printf("%s\n", what);
    std::fflush(stdout);
    std::_Exit(1);
}

// Now and then somebody is late, and the first block is always slow.
static void dawdle() {
    if (random_numbers() % (rank_now ? 8 : 3) == 0)
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

// A block's shared memory and its warp of kLanes.
struct Block {
    std::vector<unsigned char> memory;
    std::map<unsigned, std::unique_ptr<Barrier>> barriers;
    std::barrier<> lanes{kLanes};
    std::atomic<int> num_gone = 0;
};
static std::vector<std::unique_ptr<Block>> blocks;

static Block& block_at(unsigned address) {
    Block& block = *blocks[address >> kRankShift];
    if (block.num_gone == kLanes) fail("a block that has gone is written to");
    return block;
}
static Block& own_block() { return *blocks[rank_now]; }
static unsigned char* bytes_at(Block& block, unsigned address) {
    const unsigned place = (address & kAddress) - kBuffer;
    if (place % 16 || place + 16 > block.memory.size()) fail("a pack lies outside of the buffer");
    return &block.memory[place];
}

static void wait_for_phase(unsigned barrier, unsigned parity) {
    dawdle();
    own_block().barriers.at(barrier)->wait(parity);
}
static void wait_for_cluster_phase(unsigned barrier, unsigned parity) { wait_for_phase(barrier, parity); }
static unsigned address_at_rank(unsigned address, int rank) {
    return address | static_cast<unsigned>(rank) << kRankShift;
}
static void arrive_at_rank(unsigned barrier, int rank) {
    dawdle();
    block_at(address_at_rank(barrier, rank)).barriers.at(barrier)->change(1, 0);
}
static void arrive_expecting(unsigned barrier, unsigned bytes) { own_block().barriers.at(barrier)->change(1, bytes); }
static void publish_shared_writes() {}
static void __syncwarp() { own_block().lanes.arrive_and_wait(); }

static void store_at_rank(unsigned to, const float* from, unsigned barrier) {
    dawdle();
    std::memcpy(bytes_at(block_at(to), to), from, 16);
    block_at(barrier).barriers.at(barrier & kAddress)->change(0, -16 * (32 / kLanes));
}
static void load_shared_floats(float (&to)[4], unsigned from) { std::memcpy(to, bytes_at(own_block(), from), 16); }

#include "small_linear_tiles.cuh"

static float sum_of(int tile, int rank, int lane, int i) {
    return static_cast<float>((tile * 7919 + rank * 104729 + lane * 1299709 + i * 15485863) % 999983) / 1e3f;
}

template <int kGroups> static void run_lane(int rank, int lane, int num_groups) {
    using Sums = Exchange<kGroups>;
    rank_now = rank, threadIdx.x = 3 * 32 + lane;
    random_numbers.seed(num_groups * 64 + rank * 32 + lane);
    Sums exchange{kBuffer, kFull, kEmpty, rank, num_groups, 0};
    for (int tile = 0; tile < kTiles; ++tile) {
        float sums[kGroups * 4], own[Sums::kOwn * 4];
        for (int i = 0; i < kGroups * 4; ++i) sums[i] = sum_of(tile, rank, lane, i);
        exchange.add_up(own, sums, tile + 1 == kTiles);
        for (int i = 0; i < Sums::kOwn * 4; ++i) {
            const int group = i / 4 * kSplits + rank;
            float wanted = 0;
            for (int from = 0; from < kSplits; ++from) wanted += sum_of(tile, from, lane, group * 4 + i % 4);
            if (group < num_groups && own[i] != wanted) fail("a sum is not that of all blocks in their order");
        }
    }
    ++blocks[rank]->num_gone;
}

template <int kGroups> static void check(int num_groups) {
    blocks.clear();
    for (int rank = 0; rank < kSplits; ++rank) {
        Block& block = *blocks.emplace_back(std::make_unique<Block>());
        block.memory.assign(Exchange<kGroups>::kBytes, 0xff);
        block.barriers[kFull] = std::make_unique<Barrier>(1);
        block.barriers[kEmpty] = std::make_unique<Barrier>(kSplits - 1);
    }
    std::vector<std::jthread> lanes;
    for (int rank = 0; rank < kSplits; ++rank)
        for (int lane = 0; lane < kLanes; ++lane) lanes.emplace_back(run_lane<kGroups>, rank, lane, num_groups);
}

template <int kRows> static void check_all() {
    static_assert(kSplits <= kLanes);
    for (int repeat = 0; repeat < 4; ++repeat)
        for (int num_groups = 1; num_groups <= kRows / 8; ++num_groups) check<kRows / 8>(num_groups);
}

int main() {
    check_all<16>();
    check_all<32>();
    check_all<64>();
    check_all<96>();
    check_all<128>();
}
