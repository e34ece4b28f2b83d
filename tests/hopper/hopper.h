// The functions of `mxrot/kernels/cuda/hopper.cuh` on a CPU, so that the arithmetic, addresses and handshakes of a kernel
// run without a GPU. Threads are fibers, and blocks run at different paces. Copies arrive late and in random order.
// Products are computed as late as possible, when they are waited for. A launch fails, with a sentence, if threads wait
// for ever, if a barrier gets more arrivals than it expects, or if memory of a block that has ended is used. Not
// modelled: the order in which other threads see stores, registers, and the fewer bits in which Hopper sums products.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

struct alignas(64) Map {  // address, rows, width, rows of a box, width of a box
  u64 words[16];
};
struct uint4 {
  u32 x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  int x;
};
static Index threadIdx, blockIdx, gridDim;

namespace machine {

struct Barrier {
  int expected = 0, missing = 0;
  long bytes = 0;
  u32 phase = 0;
};
struct Meeting {
  int arrived = 0;
  u64 number = 0;
};
struct Cluster {
  int arrived = 0, alive = 0;
  u64 number = 0;
};
struct Product {
  float* sums;
  u32 numbers[4];
  u64 operand;
  bool adds;
};
struct Block {
  std::vector<u8> memory;
  std::map<u32, Barrier> barriers;
  std::map<int, Meeting> meetings;
  Cluster* cluster = nullptr;
  int first_of_cluster = 0, alive = 0;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block = 0, index = 0;
  bool has_ended = false, is_in_cluster_barrier = false;
  u64 cluster_number = 0;
  std::vector<std::function<void()>> copies;
  std::vector<Product> products;
};
struct Event {
  long when;
  std::function<void()> happens;
};

static constexpr int STACK = 1 << 17, UNALIGNED = 272, INPUTS_ARRIVE = 40, QUIET = 100;
static std::vector<std::unique_ptr<Block>> blocks;
static std::vector<std::unique_ptr<Thread>> threads;
static std::vector<Event> events;
static std::mt19937 random_numbers;
static std::function<void()> kernel;
static ucontext_t scheduler;
static Thread* running;
static std::string failure;
static long now, progress;
static int block_threads, team_size;

static Block& mine() { return *blocks[running->block]; }
static void resume_scheduler() { swapcontext(&running->context, &scheduler); }
[[noreturn]] static void fail(const std::string& why) {
  const std::string where = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
  if (failure.empty()) failure = why + " (" + where + ")";
  for (;;) resume_scheduler();
}
static void later(std::function<void()> happens) {
  events.push_back({now + 1 + (long)(random_numbers() % 24), std::move(happens)});
}

static void check(Barrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.phase++;
  barrier.missing = barrier.expected;
}
static Barrier& barrier_of(Block& block, u32 at) {
  const auto found = block.barriers.find(at);
  if (found == block.barriers.end()) fail("no barrier at " + std::to_string(at));
  if (!block.alive) fail("a barrier of a block that has ended");
  return found->second;
}
static void arrive_at(Block& block, u32 at, long bytes) {
  Barrier& barrier = barrier_of(block, at);
  if (!barrier.missing) fail("one arrival too many at barrier " + std::to_string(at));
  barrier.missing--;
  barrier.bytes += bytes;
  progress++;
  check(barrier);
}
static void check(Cluster& cluster) {
  if (!cluster.alive || cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  cluster.number++;
  progress++;
}

// The swizzle of 128 bytes: bits 4 to 6 of an address change with bits 7 to 9.
static u32 swizzled(u32 at) { return at ^ ((at >> 7 & 7) << 4); }

static void copy_into(int which, u32 to, const Map map, int column, int row, u32 barrier_at) {
  Block& block = *blocks[which];
  const u8* const from = (const u8*)map.words[0];
  const long rows = map.words[1], width = map.words[2], tall = map.words[3], wide = map.words[4];
  if (to % 128 || wide != 128 || (map.words[0] | width) % 16) fail("a box that the copy engine does not take");
  if (to + tall * wide > block.memory.size()) fail("a box beyond shared memory");
  Barrier& barrier = barrier_of(block, barrier_at);
  for (long y = 0; y < tall; y++)
    for (long x = 0; x < wide; x++) {
      const bool is_inside = row + y < rows && column + x < width;
      block.memory[swizzled(to + y * wide + x)] = is_inside ? from[(row + y) * width + column + x] : 0;
    }
  barrier.bytes -= tall * wide;
  progress++;
  check(barrier);
}

static float e5m2(u8 byte) {
  const int exponent = byte >> 2 & 31, fraction = byte & 3;
  const float value = exponent ? std::ldexp(1 + fraction / 4.0f, exponent - 15) : std::ldexp(fraction / 4.0f, -14);
  return byte & 128 ? -value : value;
}

static void enter() {
  kernel();
  Thread& thread = *running;
  Block& block = mine();
  thread.has_ended = true;
  progress++;
  block.alive--;
  if (thread.is_in_cluster_barrier && thread.cluster_number == block.cluster->number) block.cluster->arrived--;
  block.cluster->alive--;
  check(*block.cluster);
  for (;;) resume_scheduler();
}

// The failure of a launch, or nothing. `late` are inputs that the kernel before this one has written only when it is
// waited for.
static const char* launch(int teams, int team, int threads_of_block, int shared, u32 seed, const void* late, void* inputs,
                          long late_bytes, std::function<void()> function) {
  kernel = std::move(function);
  blocks.clear(), threads.clear(), events.clear(), failure.clear();
  random_numbers.seed(seed);
  block_threads = threads_of_block, team_size = team, now = 0;
  gridDim.x = teams * team;
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (int which = 0; which < teams * team; which++) {
    if (which % team == 0) clusters.push_back(std::make_unique<Cluster>());
    auto block = std::make_unique<Block>();
    block->memory.assign(UNALIGNED + shared, 0xA5);
    block->cluster = clusters.back().get();
    block->first_of_cluster = which / team * team;
    block->alive = threads_of_block;
    block->cluster->alive += threads_of_block;
    blocks.push_back(std::move(block));
    for (int index = 0; index < threads_of_block; index++) {
      auto thread = std::make_unique<Thread>();
      thread->block = which, thread->index = index;
      thread->stack.reset(new char[STACK]);
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.get();
      thread->context.uc_stack.ss_size = STACK;
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, enter, 0);
      threads.push_back(std::move(thread));
    }
  }
  std::vector<int> warps(threads.size() / 32), pace(blocks.size());
  for (int& each : pace) each = 1 + random_numbers() % 4;  // of four rounds
  int quiet = 0;
  for (size_t which = 0; which < warps.size(); which++) warps[which] = which;
  for (bool is_alive = true; is_alive; now++) {
    const long before = progress;
    if (now == INPUTS_ARRIVE && late) std::memcpy(inputs, late, late_bytes), progress++;
    std::shuffle(warps.begin(), warps.end(), random_numbers);
    is_alive = false;
    for (int warp : warps) {
      const bool rests = (int)(random_numbers() % 4) >= pace[threads[warp * 32]->block];
      for (int lane = 0; lane < 32; lane++) {
        running = threads[warp * 32 + lane].get();
        if (running->has_ended) continue;
        is_alive = true;
        if (rests) continue;
        threadIdx.x = running->index, blockIdx.x = running->block;
        swapcontext(&scheduler, &running->context);
        if (!failure.empty()) return failure.c_str();
      }
    }
    std::vector<Event> due;
    const auto rest = std::partition(events.begin(), events.end(), [](const Event& event) { return event.when > now; });
    due.assign(rest, events.end());
    events.erase(rest, events.end());
    for (Event& event : due) {
      event.happens();
      if (!failure.empty()) return failure.c_str();
    }
    quiet = before == progress && events.empty() && now > INPUTS_ARRIVE ? quiet + 1 : 0;
    if (quiet > QUIET) return "threads wait for ever";
  }
  return events.empty() ? nullptr : "a block has ended before its copies";
}

}  // namespace machine

inline u8* shared_memory() { return machine::mine().memory.data() + machine::UNALIGNED; }
inline u32 shared_address(const void* at) { return (u32)((const u8*)at - machine::mine().memory.data()); }

inline void init_barrier(u32 at, int arrivals) {
  machine::Barrier barrier;
  barrier.expected = barrier.missing = arrivals;
  if (at % 8 || at + 8 > machine::mine().memory.size()) machine::fail("a barrier outside of shared memory");
  machine::mine().barriers[at] = barrier;
}
inline void publish_barriers() {}
inline void arrive(u32 at) { machine::arrive_at(machine::mine(), at, 0); }
inline void arrive_in(u32 at, int block) {
  machine::arrive_at(*machine::blocks[machine::mine().first_of_cluster + block], at, 0);
}
inline void arrive_and_expect(u32 at, int bytes) { machine::arrive_at(machine::mine(), at, bytes); }
inline void wait(u32 at, u32 parity) {
  while ((machine::barrier_of(machine::mine(), at).phase & 1) == parity) machine::resume_scheduler();
}

inline void wait_for_others(u32 at, u32 parity) { wait(at, parity); }
inline void store_in(u32 at, int block, u32 a, u32 b, u32 c, u32 d) {
  machine::Block& other = *machine::blocks[machine::mine().first_of_cluster + block];
  if (!other.alive) machine::fail("a store into a block that has ended");
  if (at % 16 || at + 16 > other.memory.size()) machine::fail("a store outside of shared memory");
  const u32 numbers[4] = {a, b, c, d};
  std::memcpy(other.memory.data() + at, numbers, 16);
}

inline void copy_box(u32 to, const Map* map, int column, int row, u32 barrier) {
  machine::later([=, which = machine::running->block, held = *map] {
    machine::copy_into(which, to, held, column, row, barrier);
  });
}
inline void copy_box_to_all(u32 to, const Map* map, int column, int row, u32 barrier, int blocks) {
  if (blocks != machine::team_size) machine::fail("a copy to blocks that are not the cluster");
  for (int block = 0; block < blocks; block++)
    machine::later([=, which = machine::mine().first_of_cluster + block, held = *map] {
      machine::copy_into(which, to, held, column, row, barrier);
    });
}
inline void copy_bytes(u32 to, const u8* from, int bytes) {
  if ((u64)from % bytes || to % bytes) machine::fail("a copy that is not aligned");
  machine::running->copies.push_back(
      [=, which = machine::running->block] { std::memcpy(machine::blocks[which]->memory.data() + to, from, bytes); });
}
inline void copy_4(u32 to, const u8* from) { copy_bytes(to, from, 4); }
inline void copy_8(u32 to, const u8* from) { copy_bytes(to, from, 8); }
inline void arrive_after_copies(u32 at) {
  machine::later([=, which = machine::running->block, copies = std::move(machine::running->copies)] {
    for (const auto& copy : copies) copy();
    machine::arrive_at(*machine::blocks[which], at, 0);
  });
  machine::running->copies.clear();
}

inline void meet(int which, int threads) {
  machine::Meeting& meeting = machine::mine().meetings[which];
  const u64 number = meeting.number;
  machine::progress++;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    meeting.number++;
  }
  while (meeting.number == number) machine::resume_scheduler();
}
inline void __syncthreads() { meet(0, machine::block_threads); }
inline void meet_warp() { meet(200 + threadIdx.x / 32, 32); }
inline int block_of_cluster() { return blockIdx.x % machine::team_size; }
inline void arrive_in_cluster() {
  machine::Cluster& cluster = *machine::mine().cluster;
  if (machine::running->is_in_cluster_barrier) machine::fail("two arrivals in a cluster without a wait");
  machine::running->is_in_cluster_barrier = true;
  machine::running->cluster_number = cluster.number;
  cluster.arrived++;
  machine::check(cluster);
}
inline void wait_for_cluster() {
  machine::Cluster& cluster = *machine::mine().cluster;
  while (cluster.number == machine::running->cluster_number) machine::resume_scheduler();
  machine::running->is_in_cluster_barrier = false;
}
inline void wait_for_previous_kernel() {
  while (machine::now <= machine::INPUTS_ARRIVE) machine::resume_scheduler();
}
inline void allow_next_kernel() {}
template <int COUNT>
void release_registers() {}
template <int COUNT>
void take_registers() {}

inline void store_at_once(uint4* to, u32 a, u32 b, u32 c, u32 d) {
  *to = {a, b, c, d};
  machine::progress++;
}
inline uint4 load_at_once(const uint4* from) {
  machine::resume_scheduler();
  return *from;
}

inline u32 permute(u32 low, u32 high, u32 selected) {
  const u64 table = (u64)high << 32 | low;
  u32 found = 0;
  for (int place = 0; place < 4; place++) {
    const u32 nibble = selected >> 4 * place & 15;
    const u8 byte = (u8)(table >> 8 * (nibble & 7));
    found |= (u32)(nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * place;
  }
  return found;
}
inline u32 __float_as_uint(float value) {
  u32 found;
  std::memcpy(&found, &value, 4);
  return found;
}
inline float __uint_as_float(u32 value) {
  float found;
  std::memcpy(&found, &value, 4);
  return found;
}
inline float __int_as_float(int value) { return __uint_as_float((u32)value); }
inline u16 to_bfloat16(float value) {
  const u32 bits = __float_as_uint(value);
  return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline u16 to_float16(float value) {
  const _Float16 found = (_Float16)value;
  u16 bits;
  std::memcpy(&bits, &found, 2);
  return bits;
}

template <int COUNT>
void add_products(float (&sums)[COUNT], u32 a, u32 b, u32 c, u32 d, u64 operand, int adds) {
  machine::running->products.push_back({sums, {a, b, c, d}, operand, adds != 0});
}
inline void begin_products() {}
inline void start_products() {}
// m64nNk32 with the first operand in registers, as PTX lays it out, and the second K-major with a swizzle of 128 bytes.
inline void finish_products() {
  using namespace machine;
  Thread* const thread = running;
  const int group = thread->index / 128, lane = thread->index % 32;
  meet(100 + group, 128);
  static float values[256];
  for (int byte = 0; byte < 256; byte++) values[byte] = e5m2((u8)byte);
  const u8* const memory = mine().memory.data();
  const int first_of_four = thread->block * block_threads + thread->index - lane % 4;
  for (size_t which = 0; which < thread->products.size(); which++) {
    const Product& product = thread->products[which];
    if (product.operand >> 62 != 1 || (product.operand >> 16 & 0x3FFF) != 1) fail("an operand of another layout");
    const u32 start = (product.operand & 0x3FFF) << 4, eight_rows = (product.operand >> 32 & 0x3FFF) << 4;
    float left[2][32];
    for (int four = 0; four < 4; four++) {
      const Thread& other = *threads[first_of_four + four];
      if (other.products.size() != thread->products.size()) fail("threads of a warpgroup start other products");
      for (int place = 0; place < 16; place++) {
        const int part = place / 4, byte = place % 4;
        left[part % 2][part / 2 * 16 + four * 4 + byte] = values[other.products[which].numbers[part] >> 8 * byte & 255];
      }
    }
    for (int place = 0; place < INPUTS / 2; place++) {
      const int input = place / 4 * 8 + lane % 4 * 2 + place % 2, upper = place / 2 % 2;
      float sum = product.adds ? product.sums[place] : 0;
      for (int k = 0; k < 32; k++)
        sum += left[upper][k] * values[memory[swizzled(start + input / 8 * eight_rows + input % 8 * 128 + k)]];
      product.sums[place] = sum;
    }
  }
  meet(100 + group, 128);
  thread->products.clear();
}
inline void hold(float&) {}
inline void hold(const u32&) {}
