// MXFP4 inputs, as E5M2, times packed MXFP4 weights. Each block processes its share of all chunks of 256 columns of all
// tiles. `middle.py` explains the computation, defines the constants, and writes `add_products`.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) Map {  // CUtensorMap
  u64 words[16];
};

constexpr int THREADS = 128 * GROUPS;  // plus a warpgroup, in which one warp starts the copies
constexpr int TILE_ROWS = 64 * GROUPS;
constexpr int SUMS = INPUTS / 2;  // per thread
constexpr int HALF_BYTES = INPUTS * 128;  // inputs of 128 columns
constexpr int INPUT_BYTES = 2 * HALF_BYTES;
constexpr int WORD_BYTES = TILE_ROWS * 128;
constexpr int STAGE_BYTES = INPUT_BYTES + WORD_BYTES;

#if OUTPUT == 2
typedef u32 Number;
#else
typedef unsigned short Number;
#endif
constexpr int PITCH = 64 * sizeof(Number) + 16;  // outputs of a warpgroup in shared memory, [INPUTS, 64]

// Shared memory: stages, their scales, outputs, barriers. In a stage, both halves of the inputs and the words are
// swizzled and start at multiples of 1024.
constexpr int SCALES_AT = STAGES * STAGE_BYTES;
constexpr int OUTPUTS_AT = SCALES_AT + STAGES * TILE_ROWS * 8;
constexpr int BARRIERS_AT = OUTPUTS_AT + GROUPS * INPUTS * PITCH;

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void init_barrier(u32 at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(u32 at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 at, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(at),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const Map* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const u8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_8(u32 to, const u8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
// Arrives when all earlier copies of this thread are done.
__device__ __forceinline__ void arrive_after_copies(u32 at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void meet(int which, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory");
}
constexpr u32 NOTHING = 0xFFFFFFFFu;
__device__ __forceinline__ void store_at_once(uint4* to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ uint4 load_at_once(const uint4* from) {
  uint4 found;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from)
               : "memory");
  return found;
}
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selected) {
  u32 found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(selected));
  return found;
}

// Converts eight codes to eight E5M2 numbers, with the bytes of the eight magnitudes. `ones` is 0x80808080.
__device__ __forceinline__ void look_up(u32 codes, u32 low, u32 high, u32 ones, u32& first, u32& second) {
  const u32 magnitudes = codes & 0x77777777u;
  const u32 signs = permute(ones, ones, codes), later = permute(ones, ones, codes >> 16);
  first = ((signs << 1) & 0x80808080u) | permute(low, high, magnitudes);
  second = ((later << 1) & 0x80808080u) | permute(low, high, magnitudes >> 16);
}

// The position of a block in its share. The last tile is first, and in each tile the first chunk.
struct Cursor {
  int tile, chunk, end;
  __device__ __forceinline__ void open(int which, int first, int last, int chunks) {
    tile = which;
    chunk = max(first - which * chunks, 0);
    end = min(last - which * chunks, chunks);
  }
  __device__ __forceinline__ bool next(int first, int last, int chunks) {
    if (++chunk < end) return false;
    if (tile * chunks > first) open(tile - 1, first, last, chunks);
    return true;
  }
};

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    middle_rows(const __grid_constant__ Map inputs, const __grid_constant__ Map codes, const u8* scales,
                const int* exponents, Number* out, uint4* parts, int count, int rows, int groups, int chunks,
                int input_tiles, int tiles, int are_whole) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  const u32 base = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32;
  const int units = tiles * chunks;
  const int shared_out = are_whole ? tiles : units, each = are_whole ? chunks : 1;
  const int first = (int)((long long)shared_out * blockIdx.x / gridDim.x) * each;
  const int last = (int)((long long)shared_out * (blockIdx.x + 1) / gridDim.x) * each;
  const int steps = last - first;
  Cursor at;
  at.open((last - 1) / chunks, first, last, chunks);
  // Barrier `slot`: the stage is loaded. Barrier STAGES + slot: all warps are done with it.
  const u32 barriers = base + BARRIERS_AT;
  if (thread == 0) {
    for (int slot = 0; slot < STAGES; slot++) {
      init_barrier(barriers + slot * 8, 33);
      init_barrier(barriers + (STAGES + slot) * 8, THREADS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (thread >= THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPIER_REGISTERS));
    if (thread >= THREADS + 32) return;
    constexpr int EACH = TILE_ROWS / 32;
    const u8* scales_at[EACH];
    int tile = -1, first_row = 0, first_input = 0;
    const auto open = [&]() {
      tile = at.tile;
      first_row = tile / input_tiles * TILE_ROWS;
      first_input = tile % input_tiles * INPUTS;
#pragma unroll
      for (int which = 0; which < EACH; which++)
        scales_at[which] = scales + (size_t)min(first_row + which * 32 + lane, rows - 1) * groups;
    };
    const auto fetch_weights = [&](int slot) {
      const u32 full = barriers + slot * 8;
      if (lane == 0) {
        arrive_and_expect(full, STAGE_BYTES);
        copy_box(base + slot * STAGE_BYTES + INPUT_BYTES, &codes, at.chunk * 128, first_row, full);
      }
#pragma unroll
      for (int which = 0; which < EACH; which++) {
        const u32 to = base + SCALES_AT + (slot * TILE_ROWS + which * 32 + lane) * 8;
        const u8* const from = scales_at[which] + at.chunk * 8;
        if (groups % 8 == 0) {
          copy_8(to, from);
        } else {
          copy_4(to, from);
          if (at.chunk * 8 + 4 < groups) copy_4(to + 4, from + 4);
        }
      }
      arrive_after_copies(full);
    };
    const auto fetch_inputs = [&](int slot) {
      if (lane != 0) return;
      copy_box(base + slot * STAGE_BYTES, &inputs, at.chunk * 256, first_input, barriers + slot * 8);
      copy_box(base + slot * STAGE_BYTES + HALF_BYTES, &inputs, at.chunk * 256 + 128, first_input, barriers + slot * 8);
    };
    const Cursor start = at;
    for (int step = 0; step < STAGES && step < steps; step++) {
      if (at.tile != tile) open();
      fetch_weights(step);
      at.next(first, last, chunks);
    }
    if (OVERLAP) asm volatile("griddepcontrol.wait;" ::: "memory");
    at = start;
    tile = -1;
    u32 parity = 1;
    for (int step = 0, slot = 0; step < steps; step++) {
      if (at.tile != tile) open();
      if (step >= STAGES) {
        wait(barriers + (STAGES + slot) * 8, parity);
        fetch_weights(slot);
      }
      fetch_inputs(slot);
      at.next(first, last, chunks);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  if (OVERLAP) asm volatile("griddepcontrol.launch_dependents;");
  // Rows of a warp are assigned so that eight neighbouring threads load from all banks. A thread also has row + 8.
  const int group = thread / 128, row = thread / 32 * 16 + lane / 8 + lane / 4 % 2 * 4;
  const u32 ones = 0x80808080u | (u32)rows >> 31;  // stays in a register: the compiler cannot fold it
  Cursor decoded = at;
  int slot = 0, parity = 0;  // of the next stage to decode
  int bias[2];
  const auto open = [&]() {
#pragma unroll
    for (int which = 0; which < 2; which++)
      bias[which] = 112 + exponents[min(decoded.tile / input_tiles * TILE_ROWS + row + 8 * which, rows - 1)];
  };
  const auto decode = [&](u32(&numbers)[16], bool is_second) {
    const u8* const words_at =
        shared + slot * STAGE_BYTES + INPUT_BYTES + row * 128 + ((lane % 4 + 4 * is_second ^ row % 8) << 4);
    const u8* const scales_at = shared + SCALES_AT + (slot * TILE_ROWS + row) * 8 + lane % 4 + 4 * is_second;
    if (!is_second) wait(barriers + slot * 8, parity);
#pragma unroll
    for (int which = 0; which < 2; which++) {
      const uint4 words = *(const uint4*)(words_at + which * 1024);
      // The E5M2 exponent field. If it is out of range, the block holds only zeros, whose byte is 0 in any case.
      const u32 field = (int)scales_at[which * 64] - bias[which];
      const u32 low = field * 0x04040400u + (0x02000000u - 0x0400u), high = field * 0x04040404u + 0x0A080604u;
      look_up(words.x, low, high, ones, numbers[which], numbers[which + 2]);
      look_up(words.y, low, high, ones, numbers[which + 4], numbers[which + 6]);
      look_up(words.z, low, high, ones, numbers[which + 8], numbers[which + 10]);
      look_up(words.w, low, high, ones, numbers[which + 12], numbers[which + 14]);
    }
    if (!is_second) return;
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
    if (decoded.next(first, last, chunks)) open();
  };

  float sums[SUMS], total[SUMS];
#pragma unroll
  for (int which = 0; which < SUMS; which++) sums[which] = total[which] = 0;
  int used = 0;  // the stage being multiplied
  u32 now[16], then[16];
  const auto multiply = [&](u32(&numbers)[16], int half, bool adds) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const u64 operand =
        (u64)((base + used * STAGE_BYTES + half * HALF_BYTES) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
    for (int part = 0; part < 4; part++)
      add_products(sums, numbers[4 * part], numbers[4 * part + 1], numbers[4 * part + 2], numbers[4 * part + 3],
                   operand + 2 * part, adds || part);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  const auto wait_for_products = [&](u32(&numbers)[16]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int which = 0; which < SUMS; which++) asm volatile("" : "+f"(sums[which])::"memory");
#pragma unroll
    for (int which = 0; which < 16; which++) asm volatile("" ::"r"(numbers[which]));
  };
  const auto add_up = [&]() {
#pragma unroll
    for (int which = 0; which < SUMS; which++) total[which] += sums[which];
  };

  open();
  decode(now, false);
  for (int left = steps; left > 0;) {
    const int tile = at.tile, end = at.end;
    for (int step = at.chunk; step < end; step++) {
      left--;
      multiply(now, 0, false);
      decode(then, true);
      wait_for_products(now);
      if (PROMOTE == 1) add_up();
      multiply(then, 1, PROMOTE == 2);
      if (left) decode(now, false);
      wait_for_products(then);
      if (lane == 0) arrive(barriers + (STAGES + used) * 8);
      if (++used == STAGES) used = 0;
      add_up();
    }
    if (at.tile * chunks > first) at.open(tile - 1, first, last, chunks);

    // Either pass the sums on, or add those of other blocks and write the outputs. Sums are passed on in places that
    // hold NOTHING, a NaN that no sum can be. The block that reads them writes NOTHING there again.
    if (end < chunks) {
      uint4* const mine = parts + (size_t)blockIdx.x * (SUMS / 4) * THREADS + thread;
#pragma unroll
      for (int which = 0; which < SUMS / 4; which++)
        store_at_once(mine + which * THREADS, __float_as_uint(total[4 * which]), __float_as_uint(total[4 * which + 1]),
                      __float_as_uint(total[4 * which + 2]), __float_as_uint(total[4 * which + 3]));
    } else {
      const long long begins = (long long)tile * chunks;
      const int earliest = begins < first ? (int)(((begins + 1) * gridDim.x - 1) / units) : blockIdx.x;
      for (int other = (int)blockIdx.x - 1; other >= earliest; other--) {
        uint4* const theirs = parts + (size_t)other * (SUMS / 4) * THREADS + thread;
        constexpr int BATCH = SUMS / 4 < 8 ? SUMS / 4 : 8;
#pragma unroll
        for (int batch = 0; batch < SUMS / 4; batch += BATCH) {
          uint4 found[BATCH];
          bool is_there;
          do {
            is_there = true;
#pragma unroll
            for (int which = 0; which < BATCH; which++) found[which] = load_at_once(theirs + (batch + which) * THREADS);
#pragma unroll
            for (int which = 0; which < BATCH; which++)
              is_there &= found[which].x != NOTHING & found[which].y != NOTHING & found[which].z != NOTHING &
                          found[which].w != NOTHING;
          } while (!is_there);
#pragma unroll
          for (int which = 0; which < BATCH; which++) {
            store_at_once(theirs + (batch + which) * THREADS, NOTHING, NOTHING, NOTHING, NOTHING);
            total[4 * (batch + which)] += __uint_as_float(found[which].x);
            total[4 * (batch + which) + 1] += __uint_as_float(found[which].y);
            total[4 * (batch + which) + 2] += __uint_as_float(found[which].z);
            total[4 * (batch + which) + 3] += __uint_as_float(found[which].w);
          }
        }
      }
      u8* const mine = shared + OUTPUTS_AT + group * INPUTS * PITCH;
      const int first_row = tile / input_tiles * TILE_ROWS + group * 64, first_input = tile % input_tiles * INPUTS;
      meet(group + 1, 128);
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const int place = row % 64 + 8 * upper;
        const float power = __int_as_float((127 + exponents[min(first_row + place, rows - 1)]) << 23);
#pragma unroll
        for (int which = 0; which < INPUTS / 4; which++) {
          const float value = total[which / 2 * 4 + upper * 2 + which % 2] * power;
          Number number;
#if OUTPUT == 2
          number = __float_as_uint(value);
#elif OUTPUT == 1
          asm("cvt.rn.f16.f32 %0, %1;" : "=h"(number) : "f"(value));
#else
          asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(number) : "f"(value));
#endif
          *(Number*)(mine + (which / 2 * 8 + lane % 4 * 2 + which % 2) * PITCH + place * sizeof(Number)) = number;
        }
      }
      meet(group + 1, 128);
      constexpr int EACH = 16 / sizeof(Number), ACROSS = 64 / EACH;
      const int place = thread % ACROSS * EACH;
      for (int input = thread % 128 / ACROSS; input < INPUTS && first_input + input < count; input += 128 / ACROSS) {
        const Number* const from = (const Number*)(mine + input * PITCH) + place;
        Number* const to = out + (size_t)(first_input + input) * rows + first_row + place;
        if (rows % EACH == 0) {
          if (first_row + place < rows) *(uint4*)to = *(const uint4*)from;
        } else {
          for (int which = 0; which < EACH; which++)
            if (first_row + place + which < rows) to[which] = from[which];
        }
      }
    }
#pragma unroll
    for (int which = 0; which < SUMS; which++) total[which] = 0;
  }
}
