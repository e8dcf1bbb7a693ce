// The order in which blocks go through linear_chain: the kernel's own producers, clerks and consumers, with the barriers
// of a host. Copies leave notes of what they brought, products read them; whoever reads what a product has
// made looks whether all of it was there.
#include "blocks_on_host.hpp"

struct TensorMap {
    int link;
    bool is_x;
    unsigned bytes;
};
struct bfloat16 {
    unsigned short bits;
};

// What a copy has brought to a stage.
struct Note {
    int link = -1, column = -1, first = -1;
    bool is_x = false;
};
static thread_local std::map<unsigned, Note>* notes;  // of this block, by address; the barriers order them
static std::vector<std::unique_ptr<std::map<unsigned, Note>>> all_notes;
static std::atomic<int> num_multiplied[4];  // lanes that have
static int num_consumer_lanes;
static unsigned num_arrived;

static void check_made(int link) {
    if (num_multiplied[link] != num_consumer_lanes) fail("a product is read before all blocks have stored it");
}

static void copy_note(unsigned to, const TensorMap* map, int column, int first, unsigned barrier) {
    dawdle();
    if (map->is_x && map->link > 0) check_made(map->link - 1);
    (*notes)[to] = {map->link, column, first, map->is_x};
    own_block().at(barrier).change(0, -static_cast<long>(map->bytes));
}
static void copy_box(unsigned to, const TensorMap* map, int column, int row, unsigned barrier, unsigned long long) {
    copy_note(to, map, column, row, barrier);
}
static void copy_groups(unsigned to, const TensorMap* map, int column, int group, unsigned barrier, unsigned long long) {
    copy_note(to, map, column, 8 * group, barrier);
}
static unsigned long long read_once_policy() { return 0; }
static unsigned long long keep_policy() { return 0; }
static void bring_near(const TensorMap*) {}
static int __shfl_sync(unsigned, int value, int) { return value; }

static unsigned long long descriptor(unsigned address) { return address; }
static void begin_products() {}
static void commit_products() {}
// Instructions of a whole warp.
template <int kPending = 0> static void wait_for_products() { __syncwarp(); }
template <int kCount> static void settle(float (&)[kCount]) {}
static thread_local int link_now, next_column;

// A product of the next 64 columns of a tile: both operands are of the same, of this link.
template <int kCount>
static void multiply_shared(bfloat16, float (&)[kCount], unsigned long long a, unsigned long long b, int adds) {
    dawdle();
    const Note &weight = std::prev(notes->upper_bound(a))->second, &x = std::prev(notes->upper_bound(b))->second;
    if (weight.is_x || !x.is_x) fail("a stage of x is taken for one of the weight");
    if (weight.link != link_now || x.link != link_now) fail("a product takes another link's operands");
    if (weight.column != x.column) fail("a product takes different columns of x and of the weight");
    if (adds && weight.column != next_column && weight.column != next_column - 64) fail("columns are left out");
    next_column = weight.column + 64;
}

static float to_float(bfloat16) { return 0; }
template <typename T> static float silu(float x) { return x; }
template <typename T> static float rounded(float x) { return x; }
template <typename T> static unsigned pair(float, float) { return 0; }
template <typename T> static float element_of(unsigned, int) { return 0; }
static void turn_to_rows(unsigned (&)[4], const unsigned (&)[4], unsigned) {}
static void turn_to_parts(unsigned (&)[4], const unsigned (&)[4], unsigned) {}
static void store_words(void*, const unsigned (&)[4]) { dawdle(); }
static char middle[1];
static void load_words(unsigned (&)[4], const void*) {
    if (link_now == 2) check_made(0);
}

static void publish_global_writes() {}
static void count_arrival(unsigned* counter) { ++std::atomic_ref(*counter); }
static void wait_for_arrivals(unsigned* counter, unsigned target) {
    for (int i = 0; std::atomic_ref(*counter) < target; ++i) {
        if (i == 100000) fail("blocks never meet");
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}
static unsigned count_leaving(unsigned* counter) { return std::atomic_ref(*counter)++; }

#include "linear_chain.cuh"

struct Chain {
    Link links[4] = {};
    TensorMap whole[4], rest[4], x[4];
    int num_links, rows, num_stages, num_x_stages;
};

// A warp's lane goes its way through the chain.
template <int kRows> static void run_lane(const Chain& chain, int block, int thread) {
    using Plain = Product<bfloat16, kRows, false>;
    using Gated = Product<bfloat16, kRows, true>;
    blockIdx.x = block, threadIdx.x = thread;
    random_numbers.seed(block * 1000 + thread);
    notes = all_notes[block].get();
    Room<kRows> room(1024, chain.rows, chain.num_stages, chain.num_x_stages);
    Meeting meeting{room.end, room.end + 8, &num_arrived, 0, 0};
    const auto with_product = [&](const Link& link, auto&& act) {
        link_now = link.task.weight_map->link;
        if (link.is_gated) act(Gated(link.task, room, chain.rows));
        else act(Plain(link.task, room, chain.rows));
    };
    const int warp = thread / 32;
    if (warp < kConsumers) {
        follow(chain.links, chain.num_links,
               [&](const Link& link) {
                   with_product(link, [](auto product) { product.consume(false, NoHooks()); });
                   ++num_multiplied[link_now];
               },
               [&] {
                   meeting.say_stored();
                   meeting.hear();
               });
    } else if (warp == kConsumers) {
        for (int i = 0; i < chain.num_links; ++i)
            with_product(chain.links[i], [](auto product) { product.produce_weights(); });
    } else if (warp == kConsumers + 1) {
        follow(chain.links, chain.num_links,
               [&](const Link& link) { with_product(link, [](auto product) { product.produce_inputs(); }); },
               [&] {
                   meeting.speak();
                   meeting.hear();
               });
        meeting.leave();
    } else {
        follow(chain.links, chain.num_links,
               [&](const Link& link) {
                   if (link.task.weight_map->link) check_made(link.task.weight_map->link - 1);
               },
               [&] { meeting.hear(); });
    }
}

static void add_link(Chain& chain, int features, int steps, bool is_gated, int num_clusters) {
    const int i = chain.num_links++, clusters = num_clusters, units = (features + 8 * clusters - 1) / (8 * clusters) * 8;
    const int tile = is_gated ? 64 : 128, rest = units % tile ? units % tile : min(units, tile);
    const unsigned row_bytes = is_gated ? 256 : 128;
    chain.whole[i] = {i, false, tile * row_bytes};
    chain.rest[i] = {i, false, rest * row_bytes};
    chain.x[i] = {i, true, static_cast<unsigned>((chain.rows + 7) / 8 * 8 * 128)};
    chain.links[i].task = {&chain.whole[i], &chain.rest[i], &chain.x[i], nullptr, i % 2 ? nullptr : middle, middle,
                           features, units, steps};
    chain.links[i].is_gated = is_gated;
}

template <int kRows> static void check(int rows, int num_links, const int (&features)[4], const int (&steps)[4]) {
    constexpr int kClusters = 2, kBlocks = kClusters * kClusterBlocks;
    Chain chain{{}, {}, {}, {}, 0, rows, 5, 3};
    for (int i = 0; i < num_links; ++i) add_link(chain, features[i], steps[i], i == 1, kClusters);
    for (int i = 0; i < 4; ++i) num_multiplied[i] = 0;
    gridDim.x = kBlocks, num_consumer_lanes = kBlocks * kConsumers * kLanes;
    blocks.clear(), all_notes.clear();
    for (int block = 0; block < kBlocks; ++block) {
        blocks.push_back(std::make_unique<Block>());
        all_notes.push_back(std::make_unique<std::map<unsigned, Note>>());
        blockIdx.x = block, threadIdx.x = 0;
        const Room<kRows> room(1024, rows, chain.num_stages, chain.num_x_stages);
        for (int i = 0; i < chain.num_stages; ++i) (*all_notes[block])[room.weights.data + i * room.weights.stride] = {};
        for (int i = 0; i < chain.num_x_stages; ++i) (*all_notes[block])[room.inputs.data + i * room.inputs.stride] = {};
        blocks[block]->sums_begin = room.exchange.buffer;
        blocks[block]->sums.assign(kConsumers * Room<kRows>::Sums::kBytes, 0);
        room.init();
        Meeting{room.end, room.end + 8, &num_arrived, 0, 0}.init();
    }
    std::vector<std::jthread> threads;
    for (int block = 0; block < kBlocks; ++block)
        for (int warp = 0; warp < kWarps; ++warp)
            for (int lane = 0; lane < (warp < kConsumers ? kLanes : 1); ++lane)
                threads.emplace_back([&, block, thread = 32 * warp + lane] { run_lane<kRows>(chain, block, thread); });
    threads.clear();
    if (num_arrived) fail("the counter is not left at zero");
}

int main() {
    for (int repeat = 0; repeat < 5; ++repeat) {
        // Ranges of less than a tile, of several, and clusters that have none.
        check<16>(3, 4, {264, 136, 264, 520}, {4, 9, 3, 4});
        check<16>(16, 3, {8, 400, 16, 0}, {1, 2, 7, 0});
        check<32>(19, 4, {520, 8, 520, 8}, {3, 3, 1, 2});
        check<64>(64, 4, {264, 264, 136, 264}, {6, 4, 5, 3});
        check<64>(33, 3, {128, 128, 128, 0}, {2, 2, 2, 0});
    }
}
