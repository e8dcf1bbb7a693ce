// How blocks of small_linear_tiles.cu add up: those of a cluster have sums of one tile over different columns.
#pragma once

#include "small_linear_parts.cuh"
#include "warpgroup.cuh"

constexpr int kSplits = 2;  // blocks of a cluster, a part of the columns each

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Sums of a warp for kGroups times eight rows of x, four per lane and group. Group g becomes that of block g % kSplits,
// which gets it from the same warp of all others by their own stores into its shared memory, and adds in the order of
// the blocks: what comes out depends neither on which group it is nor on which block adds.
template <int kGroups> struct Exchange {
    static_assert(kGroups % kSplits == 0);
    static constexpr int kOwn = kGroups / kSplits;
    static constexpr int kTogether = kOwn < 2 ? kOwn : 2;  // own groups that a warp has room for at a time
    static constexpr int kPackBytes = 32 * 16;
    static constexpr int kBytes = (kSplits - 1) * kTogether * kPackBytes;

    unsigned buffer, full, empty;  // this warp's: room for kBytes, barriers of 1 and of kSplits - 1 arrivals
    int rank, num_groups;          // that have rows of x
    unsigned parity;

    // A round's first group is exchanged even if it has no rows. Who got nothing from a block would be ahead of it, and
    // could arrive twice at a barrier of which it has not seen the first phase end.
    __device__ bool exists(int group) const { return group % (kTogether * kSplits) < kSplits || group < num_groups; }
    __device__ bool has_round(int round) const { return round * kTogether * kSplits < num_groups; }
    // Where a block finds what another has sent.
    __device__ unsigned pack(int from, int to, int place) const {
        const int sender = min((from - to + kSplits - 1) % kSplits, kSplits - 2);
        return buffer + (sender * kTogether + place) * kPackBytes + threadIdx.x % 32 * 16;
    }

    __device__ void send(const float (&sums)[kGroups * 4], int round) const {
        wait_for_phase(empty, parity ^ 1);
#pragma unroll
        for (int to = 0; to < kSplits; ++to) {
            if (to == rank) continue;
            const unsigned barrier = address_at_rank(full, to);
#pragma unroll
            for (int place = 0; place < kTogether; ++place) {
                const int group = (round * kTogether + place) * kSplits + to;
                if (!exists(group)) continue;
                store_at_rank(address_at_rank(pack(rank, to, place), to), sums + group * 4, barrier);
            }
        }
    }

    __device__ void receive(float (&own)[kOwn * 4], const float (&sums)[kGroups * 4], int round) const {
        int count = 0;
        for (int place = 0; place < kTogether; ++place) count += exists((round * kTogether + place) * kSplits + rank);
        if (threadIdx.x % 32 == 0) arrive_expecting(full, count * (kSplits - 1) * kPackBytes);
        wait_for_cluster_phase(full, parity);
#pragma unroll
        for (int place = 0; place < kTogether; ++place) {
            const int number = round * kTogether + place;
            if (exists(number * kSplits + rank)) add(own + number * 4, sums, number, place);
        }
    }

    __device__ void add(float* own, const float (&sums)[kGroups * 4], int number, int place) const {
#pragma unroll
        for (int from = 0; from < kSplits; ++from) {
            float part[4];
            load_shared_floats(part, pack(from, rank, place));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int group = number * kSplits + from;
                if (from == rank) part[e] = sums[group * 4 + e];
                own[e] = from == 0 ? part[e] : own[e] + part[e];
            }
        }
    }

    // With the fence for the reason that `release` has. After the last round nobody sends any more, and may have gone.
    __device__ void make_room() const {
        publish_shared_writes();
        __syncwarp();
        const int to = static_cast<int>(threadIdx.x) % 32;
        if (to < kSplits && to != rank) arrive_at_rank(empty, to);
    }

    __device__ void add_up(float (&own)[kOwn * 4], const float (&sums)[kGroups * 4], bool is_last) {
        constexpr int kRounds = kOwn / kTogether;
        static_assert(kOwn % kTogether == 0);
#pragma unroll
        for (int round = 0; round < kRounds && has_round(round); ++round) {
            send(sums, round);
            receive(own, sums, round);
            if (!is_last || (round + 1 < kRounds && has_round(round + 1))) make_room();
            parity ^= 1;
        }
    }
};

#endif
