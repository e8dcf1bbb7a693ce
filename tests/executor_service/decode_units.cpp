// The units of paged_decode_attention on the host: a warp's lanes are threads that meet at every exchange. Over random
// batches, units must be numbered as promised and cover every visible token of every pass once, in subtrees of chunks
// that depend on the request alone. Prints what is wrong and ends with 1.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __frcp_rn(x) (1.0f / (x))
using std::max;
using std::min;

namespace warp {
std::barrier<> meeting(32);
int given[32];
thread_local int lane;

template <typename Answer> auto exchange(int value, Answer answer) {
    given[lane] = value;
    meeting.arrive_and_wait();
    const auto got = answer();
    meeting.arrive_and_wait();
    return got;
}
}  // namespace warp

constexpr unsigned kAllLanes = 0xffffffffu;
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
static int load_past_l1(const int* from) { return *from; }
static int __shfl_sync(unsigned, int value, int lane) {
    return warp::exchange(value, [lane] { return warp::given[lane]; });
}
static int __shfl_up_sync(unsigned, int value, int offset) {
    return warp::exchange(value, [offset] { return warp::given[max(warp::lane - offset, 0)]; });
}
static int __reduce_add_sync(unsigned, int value) {
    return warp::exchange(value, [] { return std::accumulate(warp::given, warp::given + 32, 0); });
}
static int __reduce_max_sync(unsigned, int value) {
    return warp::exchange(value, [] { return *std::max_element(warp::given, warp::given + 32); });
}
static unsigned __ballot_sync(unsigned, bool value) {
    return warp::exchange(value, [] {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(warp::given[i]) << i;
        return bits;
    });
}

#include "paged_decode_attention_units.cuh"

constexpr int kTile = 64;

static std::vector<Unit> all_units(const Inputs<float>& in, int num_blocks) {
    std::vector<Unit> found;
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back([&in, &found, num_blocks, lane] {
            warp::lane = lane;
            const Units<float, kTile> units(in, lane, num_blocks);
            for (int id = 0; id <= units.total; ++id) {
                const Unit unit = units.find(id);
                if (lane == id % 32) found.push_back(unit);  // every lane gets the same: the next meeting is after this
                __ballot_sync(kAllLanes, true);
            }
        });
    for (std::thread& lane : lanes) lane.join();
    return found;
}

// Follows the units in their order. `chunk_bits` are what requests have without anybody else's units.
static const char* wrong(const Inputs<float>& in, const std::vector<Unit>& units, const std::vector<int>& chunk_bits,
                         int most_bits) {
    auto at = units.begin();
    for (int request = 0; request < in.batch; ++request) {
        const int length = in.lengths[request], start = in.window > 0 ? max(length - in.window, 0) : 0;
        const int first = start / 16 * 16, tiles = length > 0 ? (length - first + kTile - 1) / kTile : 0;
        int tile = 0, chunk = 0;
        for (int place = 0; tile < tiles; ++place) {
            const int next = tile + at->tiles, of_unit = (1 << kLevels) / at->each, chunks = min(of_unit, 1 << at->chunk_bits);
            int head = 0;
            for (int pass = 0; pass < in.passes; ++pass, ++at) {
                if (at->tiles < 1 || at->tiles > kMostTiles) return "a unit has no tiles, or too many";
                if (at->request != request || at->place != place || at->id != at - units.begin()) return "the order";
                if (at->token != first + tile * kTile || at->start != start || at->length != length) return "the tokens";
                if (at->chunk_bits != chunk_bits[request] || at->item_tiles != tiles) return "a chunk depends on others";
                if (at->chunk != chunk || chunk % chunks) return "not a subtree";
                for (int number = 0, last = 0; number < chunks; last = at->end_of(number++)) {
                    const int of_chunk = at->end_of(number) - last, even = tiles >> at->chunk_bits;
                    if (of_chunk != even && of_chunk != even + 1) return "chunks differ by more than a tile";
                    if (of_chunk < 1 || of_chunk > 1 << kChunkBits) return "a chunk is empty, or too long";
                }
                if (at->end_of(chunks - 1) != at->tiles) return "the unit's end";
                if (at->item != request * in.passes + pass || next != tile + at->tiles) return "the passes";
                if (at->head != head || at->kv_head != head / in.group || at->heads < 1) return "the heads";
                if (head / in.group != (head + at->heads - 1) / in.group) return "heads of two KV heads";
                head += at->heads;
            }
            if (head != in.num_heads()) return "not all heads";
            tile = next, chunk += chunks;
            if (tile >= tiles && at[-1].places != place + 1) return "the number of units";
        }
        if (tile != tiles || (tiles > 0 && chunk != 1 << at[-1].chunk_bits)) return "what is seen";
        if (tiles > 0 && at[-1].chunk_bits > most_bits) return "more chunks than there is room for";
    }
    return at->tiles == 0 && at + 1 == units.end() ? nullptr : "the end";
}

// How many tiles the block of threads that gets most has, if each takes the next unit as soon as it has ended one.
static int most_tiles(const std::vector<Unit>& units, int num_blocks) {
    std::vector<int> of_block(num_blocks);
    for (const Unit& unit : units) *std::min_element(of_block.begin(), of_block.end()) += unit.tiles;
    return *std::max_element(of_block.begin(), of_block.end());
}

struct Case {
    const char* name;
    std::vector<int> lengths;
    int num_kv_heads, group;
    unsigned units;    // as many as were fastest where this was measured
    int most_tiles;
};

static const Case kCases[] = {
    {"two whole requests for each block", std::vector<int>(16, 700), 32, 1, 512, 22},
    {"the same of longer ones", std::vector<int>(16, 2048), 32, 1, 512, 64},
    {"two whole requests of four heads to a key head", std::vector<int>(64, 700), 8, 4, 512, 22},
    {"the same of longer ones", std::vector<int>(64, 2944), 8, 4, 512, 92},
    {"half a request for each block", std::vector<int>(16, 2944), 8, 4, 256, 23},
    {"as many units as there can be", std::vector<int>(1, 700), 32, 1, 128, 3},
};

static const char* wrong_case() {
    for (const Case& one : kCases) {
        const Inputs<float> in{nullptr, nullptr, nullptr, nullptr, one.lengths.data(), nullptr, nullptr,
                               static_cast<int>(one.lengths.size()), one.num_kv_heads, one.group, one.num_kv_heads, 4,
                               0, 1.0f, 0.0f, 0};
        const std::vector<Unit> units = all_units(in, 264);
        if (units.size() - 1 != one.units || most_tiles(units, 264) != one.most_tiles) {
            std::printf("%zu units, at most %d tiles: ", units.size() - 1, most_tiles(units, 264));
            return one.name;
        }
    }
    return nullptr;
}

int main() {
    std::mt19937 random(7);
    auto below = [&random](int bound) { return static_cast<int>(random() % bound); };
    int num_coarse = 0;
    for (int round = 0; round < 24; ++round) {
        std::vector<int> lengths(1 + below(round % 3 ? 8 : 1 << below(10)));
        for (int& length : lengths) length = below(4) ? below(lengths.size() > 32 ? 100 : 200 << below(7)) : 0;
        const int group = 1 + below(20), num_kv_heads = 1 + below(3);
        const int passes = num_kv_heads * ((group + kHeads - 1) / kHeads), window = below(2) ? 0 : 1 + below(3000);
        const Inputs<float> in{nullptr, nullptr, nullptr, nullptr, lengths.data(), nullptr, nullptr,
                               static_cast<int>(lengths.size()), num_kv_heads, group, passes, 4, 0, 1.0f, 0.0f, window};
        const int tiles = (*std::max_element(lengths.begin(), lengths.end()) + kTile - 1) / kTile;
        // As the launcher reckons.
        const int even = 31 - __clz(max(2 * tiles / kLeastHalves, 1)), needed = 32 - __clz(max(tiles - 1, 0) >> kChunkBits);
        const int room = max(min(even, kMostBits), needed);
        std::vector<int> chunk_bits(lengths.size());
        const std::vector<Unit> finest = all_units(in, 1 << 20);
        // Of the finest, 3 to 9 for a block of threads: where some become coarser; or any number of blocks.
        const int num_blocks = below(2) ? max(static_cast<int>(finest.size()) / (3 + below(7)), 1) : 1 << below(8);
        const std::vector<Unit> units = all_units(in, num_blocks);
        for (const Unit& unit : finest)
            if (unit.tiles) chunk_bits[unit.request] = unit.chunk_bits;
        num_coarse += units.size() < finest.size();
        for (const auto& some : {finest, units})
            if (const char* what = wrong(in, some, chunk_bits, room))
                return std::printf("round %d: %s\n", round, what), 1;
        const int all_tiles = std::accumulate(finest.begin(), finest.end(), 0, [](int sum, const Unit& unit) {
            return sum + unit.tiles;
        });
        // However lengths differ: what the finest units would cost at worst is not exceeded by more than their ends.
        const float share = static_cast<float>(all_tiles) / num_blocks;
        if (most_tiles(units, num_blocks) > 1.25f * share + 32.0f)
            return std::printf("round %d: one block has %d of %d tiles\n", round, most_tiles(units, num_blocks), all_tiles), 1;
    }
    if (const char* what = wrong_case()) return std::printf("%s\n", what), 1;
    return num_coarse < 4 ? std::printf("only %d rounds had units of several chunks\n", num_coarse), 1 : 0;
}
