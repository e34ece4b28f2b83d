// MXFP4 inputs, as E5M2, times packed MXFP4 weights. A team is a cluster of blocks. They have the same inputs and
// different weights, or with SPLIT different chunks of the same tile, whose sums the first block adds up. Each team
// processes its share of all chunks of 256 columns of all tiles. `middle.py` explains the computation, defines the
// constants, and writes `add_products`.

constexpr int THREADS = 128 * GROUPS;  // plus a warpgroup, in which one warp starts the copies
constexpr int TILE_ROWS = 64 * GROUPS;
constexpr int SUMS = INPUTS / 2;  // per thread
constexpr bool IS_SHARED = TEAM > 1 && !SPLIT;  // the inputs of a team
constexpr int COPIED = IS_SHARED ? INPUTS / TEAM : INPUTS;  // that a block copies; a multiple of 8 if for others too
constexpr int HALF_BYTES = INPUTS * 128;  // inputs of 128 columns
constexpr int INPUT_BYTES = 2 * HALF_BYTES;
constexpr int WORD_BYTES = TILE_ROWS * 128;
constexpr int STAGE_BYTES = INPUT_BYTES + WORD_BYTES;

#if OUTPUT == 2
typedef u32 Number;
#else
typedef u16 Number;
#endif
constexpr int PITCH = 64 * sizeof(Number) + 16;  // outputs of a warpgroup in shared memory, [INPUTS, 64]

// Shared memory: stages, their scales, outputs, sums of other blocks, barriers. In a stage, both halves of the inputs
// and the words are swizzled and start at multiples of 1024.
constexpr int SCALES_AT = STAGES * STAGE_BYTES;
constexpr int OUTPUTS_AT = SCALES_AT + STAGES * TILE_ROWS * 8;
constexpr int SUMS_AT = OUTPUTS_AT + GROUPS * INPUTS * PITCH;
constexpr int BARRIERS_AT = SUMS_AT + (SPLIT ? (TEAM - 1) * SUMS * THREADS * 4 : 0);

// Sums that are handed on, in units of 16 bytes per thread. A thread loads as many at once as its registers hold, of
// one team or of several: each load takes most of a microsecond.
constexpr int PARTS = SUMS / 4, REMAINING = REGISTERS - 2 * SUMS;
constexpr int IN_FLIGHT = REMAINING < 92 ? 4 : REMAINING < 140 ? 8 : 16;
constexpr int BATCH = PARTS < IN_FLIGHT ? PARTS : IN_FLIGHT, OTHERS = IN_FLIGHT / BATCH;
constexpr u32 NOTHING = 0xFFFFFFFFu;  // a NaN that no sum can be

// Converts eight codes to eight E5M2 numbers, with the bytes of the eight magnitudes. `ones` is 0x80808080.
__device__ __forceinline__ void look_up(u32 codes, u32 low, u32 high, u32 ones, u32& first, u32& second) {
  const u32 magnitudes = codes & 0x77777777u;
  const u32 signs = permute(ones, ones, codes), later = permute(ones, ones, codes >> 16);
  first = ((signs << 1) & 0x80808080u) | permute(low, high, magnitudes);
  second = ((later << 1) & 0x80808080u) | permute(low, high, magnitudes >> 16);
}

// What a team computes: its share of the chunks of the first `rest` tiles, the last tile first and in each tile the
// first chunk; then every one of the other tiles whose turn it is.
struct Share {
  int team, teams, chunks, rest, tiles, first, last;
  int begin, finish;  // chunks of a tile that is whole
};
struct Cursor {
  int tile, chunk, end;
  __device__ __forceinline__ void open(const Share& share, int which) {
    tile = which;
    chunk = share.begin, end = share.finish;
    if (SPLIT || which >= share.rest) return;
    chunk = max(share.first - which * share.chunks, 0);
    end = min(share.last - which * share.chunks, share.chunks);
  }
  __device__ __forceinline__ void start(const Share& share) {
    open(share, share.last > share.first ? (share.last - 1) / share.chunks : share.rest + share.team);
  }
  __device__ __forceinline__ bool next(const Share& share) {
    if (++chunk < end) return false;
    const bool is_last_of_share = tile < share.rest && tile * share.chunks <= share.first;
    const int after_share = is_last_of_share ? share.rest + share.team : tile + share.teams;
    const int following = tile < share.rest && !is_last_of_share ? tile - 1 : after_share;
    if (following < share.tiles) open(share, following);
    return true;
  }
};

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    middle_rows(const __grid_constant__ Map inputs, const __grid_constant__ Map codes, const u8* scales,
                const int* exponents, Number* out, uint4* parts, int count, int rows, int groups, int chunks,
                int input_tiles, int row_tiles, int rest, int are_whole) {
  u8* const unaligned = shared_memory();
  u8* const shared = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  const u32 base = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32;
  const int team = blockIdx.x / TEAM, teams = gridDim.x / TEAM, member = TEAM == 1 ? 0 : block_of_cluster();
  const int units = rest * chunks, shared_out = are_whole ? rest : units, each = are_whole ? chunks : 1;
  const int tiles = input_tiles * row_tiles;
  const Share share = {team,
                       teams,
                       chunks,
                       rest,
                       tiles,
                       (int)((long long)shared_out * team / teams) * each,
                       (int)((long long)shared_out * (team + 1) / teams) * each,
                       SPLIT ? chunks * member / TEAM : 0,
                       SPLIT ? chunks * (member + 1) / TEAM : chunks};
  const int own = SPLIT ? (share.last - share.first) / chunks * (share.finish - share.begin) : share.last - share.first;
  const int steps = own + (tiles - rest) / teams * (share.finish - share.begin);
  Cursor at;
  at.start(share);
  // Neighbouring tiles have the same weights, or inputs of the same BAND tiles, which the L2 cache holds.
  constexpr int BAND = 8;
  const auto place_of = [&](int tile, int& first_row, int& first_input) {
    const int band = tile / (BAND * row_tiles), within = tile - band * BAND * row_tiles;
    const int width = min(BAND, input_tiles - band * BAND), down = within / width;
    first_row = (SPLIT ? down : down * TEAM + member) * TILE_ROWS;
    first_input = (band * BAND + within - down * width) * INPUTS;
  };
  // Barrier `slot`: the stage is loaded. Barrier STAGES + slot: all warps are done with it, those of the team if it
  // shares inputs. The last two: sums are in the first block; it has taken them.
  const u32 barriers = base + BARRIERS_AT, sums_there = barriers + 2 * STAGES * 8, sums_taken = sums_there + 8;
  if (thread == 0) {
    for (int slot = 0; slot < STAGES; slot++) {
      init_barrier(barriers + slot * 8, 33);
      init_barrier(barriers + (STAGES + slot) * 8, (IS_SHARED ? TEAM : 1) * THREADS / 32);
    }
    if (SPLIT) {
      init_barrier(sums_there, (TEAM - 1) * THREADS / 32);
      init_barrier(sums_taken, THREADS / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (TEAM > 1) arrive_in_cluster();

  if (thread >= THREADS) {
    release_registers<COPIER_REGISTERS>();
    if (thread >= THREADS + 32) {
      if (TEAM > 1) wait_for_cluster();
      return;
    }
    constexpr int EACH = TILE_ROWS / 32;
    const u8* scales_at[EACH];
    int tile = -1, first_row = 0, first_input = 0;
    const auto open = [&]() {
      tile = at.tile;
      place_of(tile, first_row, first_input);
      if (IS_SHARED) first_input += member * COPIED;
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
      const u32 full = barriers + slot * 8;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 to = base + slot * STAGE_BYTES + half * HALF_BYTES + (IS_SHARED ? member * COPIED * 128 : 0);
        const int column = at.chunk * 256 + half * 128;
        if (!IS_SHARED)
          copy_box(to, &inputs, column, first_input, full);
        else
          copy_box_to_all(to, &inputs, column, first_input, full, TEAM);
      }
    };
    const Cursor start = at;
    for (int step = 0; step < STAGES && step < steps; step++) {
      if (at.tile != tile) open();
      fetch_weights(step);
      at.next(share);
    }
    if (OVERLAP) wait_for_previous_kernel();
    if (TEAM > 1) wait_for_cluster();
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
      at.next(share);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
    if (TEAM > 1) {
      arrive_in_cluster();
      wait_for_cluster();
    }
    return;
  }

  take_registers<REGISTERS>();
  if (OVERLAP) allow_next_kernel();
  if (TEAM > 1) wait_for_cluster();
  // Rows of a warp are assigned so that eight neighbouring threads load from all banks. A thread also has row + 8.
  const int group = thread / 128, row = thread / 32 * 16 + lane / 8 + lane / 4 % 2 * 4;
  const u32 ones = 0x80808080u | (u32)rows >> 31;  // stays in a register: the compiler cannot fold it
  Cursor decoded = at;
  int slot = 0, parity = 0;  // of the next stage to decode
  int bias[2];
  const auto open = [&]() {
    int first_row, first_input;
    place_of(decoded.tile, first_row, first_input);
#pragma unroll
    for (int which = 0; which < 2; which++)
      bias[which] = 112 + exponents[min(first_row + row + 8 * which, rows - 1)];
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
    if (decoded.next(share)) open();
  };

  float sums[SUMS], total[SUMS];
#pragma unroll
  for (int which = 0; which < SUMS; which++) sums[which] = total[which] = 0;
  int used = 0, tiles_done = 0;  // the stage being multiplied
  u32 now[16], then[16];
  const auto multiply = [&](u32(&numbers)[16], int half, bool adds) {
    begin_products();
    const u64 operand =
        (u64)((base + used * STAGE_BYTES + half * HALF_BYTES) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
    for (int part = 0; part < 4; part++)
      add_products(sums, numbers[4 * part], numbers[4 * part + 1], numbers[4 * part + 2], numbers[4 * part + 3],
                   operand + 2 * part, adds || part);
    start_products();
  };
  const auto wait_for_products = [&](u32(&numbers)[16]) {
    finish_products();
#pragma unroll
    for (int which = 0; which < SUMS; which++) hold(sums[which]);
#pragma unroll
    for (int which = 0; which < 16; which++) hold(numbers[which]);
  };
  const auto add_up = [&]() {
#pragma unroll
    for (int which = 0; which < SUMS; which++) total[which] += sums[which];
  };

  open();
  decode(now, false);
  for (int left = steps; left > 0;) {
    const int tile = at.tile, end = at.end;
    int first_row, first_input, exponent[2];
    place_of(tile, first_row, first_input);
#pragma unroll
    for (int upper = 0; upper < 2; upper++)  // loaded before it is needed
      exponent[upper] = exponents[min(first_row + row + 8 * upper, rows - 1)];
    for (int step = at.chunk; step < end; step++) {
      left--;
      multiply(now, 0, false);
      decode(then, true);
      wait_for_products(now);
      if (PROMOTE == 1) add_up();
      multiply(then, 1, PROMOTE == 2);
      if (left) decode(now, false);
      wait_for_products(then);
      const u32 empty = barriers + (STAGES + used) * 8;
      if (!IS_SHARED && lane == 0) arrive(empty);
      if (IS_SHARED && lane < TEAM) arrive_in(empty, lane);
      if (++used == STAGES) used = 0;
      add_up();
    }
    at.chunk = end - 1;
    at.next(share);

    if (SPLIT) {
      const u32 mine = base + SUMS_AT + thread * 16;
      if (member > 0) {
        if (tiles_done > 0) wait_for_others(sums_taken, tiles_done - 1 & 1);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          store_in(mine + ((member - 1) * PARTS + part) * THREADS * 16, 0, __float_as_uint(total[4 * part]),
                   __float_as_uint(total[4 * part + 1]), __float_as_uint(total[4 * part + 2]),
                   __float_as_uint(total[4 * part + 3]));
        meet_warp();
        if (lane == 0) arrive_in(sums_there, 0);
      } else {
        wait_for_others(sums_there, tiles_done & 1);
#pragma unroll
        for (int other = 1; other < TEAM; other++)
#pragma unroll
          for (int part = 0; part < PARTS; part++) {
            const int place = ((other - 1) * PARTS + part) * THREADS + thread;
            const float4 numbers = *(const float4*)(shared + SUMS_AT + place * 16);
            total[4 * part] += numbers.x;
            total[4 * part + 1] += numbers.y;
            total[4 * part + 2] += numbers.z;
            total[4 * part + 3] += numbers.w;
          }
        meet_warp();
        if (lane > 0 && lane < TEAM) arrive_in(sums_taken, lane);
      }
      tiles_done++;
    }

    // Either pass the sums on, or add those of other teams and write the outputs. Sums are passed on in places that
    // hold NOTHING. The block that reads them writes NOTHING there again.
    const bool writes = SPLIT ? member == 0 : end == chunks;
    if (!SPLIT && !writes) {
      uint4* const mine = parts + (size_t)(team * TEAM + member) * PARTS * THREADS + thread;
#pragma unroll
      for (int which = 0; which < PARTS; which++)
        store_at_once(mine + which * THREADS, __float_as_uint(total[4 * which]), __float_as_uint(total[4 * which + 1]),
                      __float_as_uint(total[4 * which + 2]), __float_as_uint(total[4 * which + 3]));
    }
    if (writes) {
      const long long begins = (long long)tile * chunks;
      const int earliest = !SPLIT && begins < share.first ? (int)(((begins + 1) * teams - 1) / units) : team;
      for (int other = team - 1; other >= earliest; other -= OTHERS) {
        uint4* const theirs = parts + (size_t)(other * TEAM + member) * PARTS * THREADS + thread;
        constexpr int BEFORE = TEAM * PARTS * THREADS;  // from one team to the one before it
#pragma unroll
        for (int batch = 0; batch < PARTS; batch += BATCH) {
          uint4 found[OTHERS][BATCH];
          bool are_there;
          do {
            are_there = true;
#pragma unroll
            for (int which = 0; which < OTHERS * BATCH; which++)
              if (other - which / BATCH >= earliest)
                found[which / BATCH][which % BATCH] =
                    load_at_once(theirs - which / BATCH * BEFORE + (batch + which % BATCH) * THREADS);
#pragma unroll
            for (int which = 0; which < OTHERS * BATCH; which++) {
              const uint4 numbers = found[which / BATCH][which % BATCH];
              if (other - which / BATCH >= earliest)
                are_there &= numbers.x != NOTHING & numbers.y != NOTHING & numbers.z != NOTHING & numbers.w != NOTHING;
            }
          } while (!are_there);
#pragma unroll
          for (int which = 0; which < OTHERS * BATCH; which++) {
            if (other - which / BATCH < earliest) continue;
            const uint4 numbers = found[which / BATCH][which % BATCH];
            const int part = batch + which % BATCH;
            store_at_once(theirs - which / BATCH * BEFORE + part * THREADS, NOTHING, NOTHING, NOTHING, NOTHING);
            total[4 * part] += __uint_as_float(numbers.x);
            total[4 * part + 1] += __uint_as_float(numbers.y);
            total[4 * part + 2] += __uint_as_float(numbers.z);
            total[4 * part + 3] += __uint_as_float(numbers.w);
          }
        }
      }
      u8* const mine = shared + OUTPUTS_AT + group * INPUTS * PITCH;
      first_row += group * 64;
      meet(group + 1, 128);
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const int place = row % 64 + 8 * upper;
        const float power = __int_as_float((127 + exponent[upper]) << 23);
#pragma unroll
        for (int which = 0; which < INPUTS / 4; which++) {
          const float value = total[which / 2 * 4 + upper * 2 + which % 2] * power;
#if OUTPUT == 2
          const Number number = __float_as_uint(value);
#elif OUTPUT == 1
          const Number number = to_float16(value);
#else
          const Number number = to_bfloat16(value);
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
  if (TEAM > 1) {  // the others may still arrive at barriers of this block
    arrive_in_cluster();
    wait_for_cluster();
  }
}
