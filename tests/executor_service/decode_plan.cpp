// The plan of paged_decode_attention on the host: over random batches, every tile is in one range, every leaf is found
// where its range writes it. Prints what is wrong and ends with 1.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
static float __fdividef(float a, float b) { return a / b * (1 + 2e-7f); }  // as coarse as the GPU's may be

#include "paged_decode_attention_plan.cuh"

struct Item {
    int base;
    Span span;
};

static int moved_to_leaf(const std::vector<Item>& items, int at, int total) {
    if (at == total) return total;
    const Item& of = *std::find_if(items.begin(), items.end(), [at](const Item& item) {
        return at < item.base + item.span.tiles;
    });
    return of.base + min(nearest_leaf(at - of.base, of.span) << of.span.leaf_shift, of.span.tiles);
}

static const char* wrong(const std::vector<Item>& items, const Line& line) {
    std::vector<int> begins;
    for (int piece = 0; piece <= line.num_pieces(); ++piece)
        begins.push_back(moved_to_leaf(items, line.begin_of(piece), line.total));
    if (begins.front() != 0 || begins.back() != line.total) return "the pieces are not the whole line";
    if (!std::is_sorted(begins.begin(), begins.end())) return "the pieces overlap";
    for (const Item& item : items) {
        if (item.span.leaves > kMaxLeaves) return "too many leaves";
        for (int leaf = 0; leaf < item.span.leaves; ++leaf) {
            const int tile = item.base + (leaf << item.span.leaf_shift);
            const int piece = std::upper_bound(begins.begin(), begins.end(), tile) - begins.begin() - 1;
            if (piece_of(leaf, item.base, item.span, line) != piece) return "a leaf is looked for in another piece";
            const int slot = begins[piece] <= item.base ? 0 : 1 + ((tile - begins[piece]) >> item.span.leaf_shift);
            if (slot_of(leaf, piece, item.base, item.span, line) != slot) return "a leaf is looked for elsewhere";
        }
    }
    return nullptr;
}

int main() {
    std::mt19937 random(7);
    auto below = [&random](int bound) { return static_cast<int>(random() % bound); };
    int num_shared = 0;
    for (int round = 0; round < 3000; ++round) {
        const int passes = 1 + below(9), window = below(3) ? 0 : 1 + below(3000), each = 1 + below(round % 3 ? 200 : 5);
        std::vector<Item> items;
        int total = 0;
        for (int request = below(12); request >= 0; --request) {
            const Span span = span_of<64>(below(4) ? below(below(2) ? 200 : 20000) : 0, window);
            for (int pass = 0; pass < passes && span.tiles; ++pass, total += span.tiles) items.push_back({total, span});
        }
        const Line line{each, total, static_cast<unsigned>(((1ull << 32) + each - 1) / each)};
        num_shared += line.num_rounds() > 1;
        if (const char* what = total ? wrong(items, line) : nullptr) return std::puts(what), 1;
    }
    return num_shared ? 0 : 1;
}
