// How blocks of a cluster add up in small_linear_tiles, on the host: the kernel's own arithmetic of places and counts
// over arrays in place of the blocks' shared memory. Says what is wrong and returns 1, or returns 0.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __CUDA_ARCH_FEAT_SM90_ALL
using std::min;

constexpr int kMostBlocks = 8;
constexpr unsigned kBuffer = 1024, kFull = 8, kEmpty = 16;
constexpr int kRankShift = 24;

static struct { int x; } threadIdx;
static int rank_now;
static unsigned num_bytes;
static std::vector<unsigned char> memory[kMostBlocks];
static std::vector<int> writes[kMostBlocks];
static unsigned sent[kMostBlocks], expected[kMostBlocks];

static void check(bool is_right, const char* what) {
    if (is_right) return;
    std::printf("%s\n", what);
    std::exit(1);
}

static void wait_for_phase(unsigned, unsigned) {}
static void wait_for_cluster_phase(unsigned, unsigned) {}
static unsigned address_at_rank(unsigned address, int rank) {
    return address | static_cast<unsigned>(rank) << kRankShift;
}
static void arrive_at_rank(unsigned, int) {}
static void arrive_expecting(unsigned, unsigned bytes) { expected[rank_now] += bytes; }
static void __syncwarp() {}

static unsigned place_of(unsigned address) {
    const unsigned place = (address & ((1u << kRankShift) - 1)) - kBuffer;
    check(place % 16 == 0 && place + 16 <= num_bytes, "a pack lies outside of the buffer");
    return place;
}

static void store_at_rank(unsigned to, const float* from, unsigned barrier) {
    const unsigned rank = to >> kRankShift, place = place_of(to);
    check(barrier == address_at_rank(kFull, static_cast<int>(rank)), "a store counts at another block's barrier");
    check(writes[rank][place]++ == 0, "two stores go to one place");
    std::memcpy(&memory[rank][place], from, 16);
    sent[rank] += 16;
}

static void load_shared_floats(float (&to)[4], unsigned from) {
    std::memcpy(to, &memory[rank_now][place_of(from)], 16);
}

#include "small_linear_tiles.cuh"

template <int kGroups> static void check_rows(int rows) {
    using Sums = Exchange<kGroups>;
    const int num_groups = (rows + 7) / 8, warp = 3;
    static float sums[kSplits][32][kGroups * 4], own[kSplits][32][Sums::kOwn * 4];
    for (auto& block : sums)
        for (auto& lane : block)
            for (float& sum : lane) sum = static_cast<float>(std::rand()) / 1e5f;
    num_bytes = Sums::kBytes;
    for (int round = 0; round * Sums::kTogether < Sums::kOwn; ++round) {
        for (int rank = 0; rank < kSplits; ++rank) {
            memory[rank].assign(num_bytes, 0xff);
            writes[rank].assign(num_bytes, 0);
            sent[rank] = expected[rank] = 0;
        }
        const auto for_all_lanes = [&](int rank, auto&& what) {
            rank_now = rank;
            for (int lane = 0; lane < 32; ++lane) {
                threadIdx.x = warp * 32 + lane;
                what(Sums{kBuffer, kFull, kEmpty, rank, num_groups, 0}, lane);
            }
        };
        for (int rank = 0; rank < kSplits; ++rank)
            for_all_lanes(rank, [&](const Sums& exchange, int lane) { exchange.send(sums[rank][lane], round); });
        for (int rank = 0; rank < kSplits; ++rank)
            for_all_lanes(rank, [&](const Sums& exchange, int lane) {
                exchange.receive(own[rank][lane], sums[rank][lane], round);
            });
        for (int rank = 0; rank < kSplits; ++rank)
            check(sent[rank] == expected[rank], "a block expects other bytes than come");
    }
    for (int group = 0; group < num_groups; ++group)
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 4; ++e) {
                float wanted = sums[0][lane][group * 4 + e];
                for (int rank = 1; rank < kSplits; ++rank) wanted += sums[rank][lane][group * 4 + e];
                const float got = own[group % kSplits][lane][group / kSplits * 4 + e];
                check(got == wanted, "a sum is not that of all blocks in their order");
            }
}

template <int kRows> static void check_all() {
    for (int rows = 1; rows <= kRows; ++rows) check_rows<kRows / 8>(rows);
}

int main() {
    check_all<16>();
    check_all<32>();
    check_all<64>();
    check_all<96>();
    check_all<128>();
}
