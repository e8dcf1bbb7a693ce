// How blocks of a cluster add up in small_linear_tiles: the kernel's own code, with the warp's and barriers' of a host.
#include "blocks_on_host.hpp"
#include "small_linear_tiles.cuh"

constexpr int kTiles = 6;
constexpr unsigned kBuffer = 1024, kFull = 8, kEmpty = 16;

static float sum_of(int tile, int rank, int lane, int i) {
    return static_cast<float>((tile * 7919 + rank * 104729 + lane * 1299709 + i * 15485863) % 999983) / 1e3f;
}

template <int kGroups> static void run_lane(int rank, int lane, int num_groups) {
    using Sums = Exchange<kGroups>;
    blockIdx.x = rank, threadIdx.x = 3 * 32 + lane;
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
        block.sums.assign(Exchange<kGroups>::kBytes, 0xff);
        block.sums_begin = kBuffer;
        block.barriers[kFull] = std::make_unique<Barrier>(1);
        block.barriers[kEmpty] = std::make_unique<Barrier>(kSplits - 1);
    }
    std::vector<std::jthread> lanes;
    for (int rank = 0; rank < kSplits; ++rank)
        for (int lane = 0; lane < kLanes; ++lane) lanes.emplace_back(run_lane<kGroups>, rank, lane, num_groups);
}

template <int kRows> static void check_all() {
    static_assert(kSplits == kClusterBlocks && kSplits <= kLanes);
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
