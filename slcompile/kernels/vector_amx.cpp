// vector.cpp, after which this stands, for bfloat16 on CPUs with AMX, whose tile registers multiply 16 x 32 with 32 x 16
// numbers at once. VECTOR is 16 or more. Sums are float; AMX takes subnormal numbers for zeros.
//
//   product      y_TN = hidden_TR @ B_NR^T + x_TK @ S_NK^T + bias_N
//   transposed   y_TK = hidden_TR @ A_RK + x_TN @ S_NK + bias_K
//   dots_amx     dots
//
// The product with the factor is made here, too: y is written once, and is not read.
//
// A second operand holds pairs: of two neighbours in the dimension that is summed over, side by side in 32 bits.
#if !defined(__AMX_BF16__) || !defined(__AVX512BF16__)
extern "C" int may_use_tiles() { return 0; }  // the compiler was told to do without
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

using Pair = uint32_t;
constexpr int SIDE = 16;  // rows of a tile register, and of float or pairs the columns

// Linux lets a process use tile registers when it asks.
extern "C" int may_use_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// While one lives, its thread's registers are: 0 sums, 2 and 3 second operands, 4 a first operand, of
// sums [rows, SIDE] += first [rows, 2 pairs] @ second [pairs, SIDE]; and 1 sums, 5 a first operand, 6 and 7 second ones,
// as large as they can be.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t pairs) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) shapes.rows[i] = SIDE, shapes.bytes[i] = SIDE * sizeof(Pair);
    shapes.rows[0] = shapes.rows[4] = rows;
    shapes.rows[2] = shapes.rows[3] = pairs;
    shapes.bytes[4] = pairs * sizeof(Pair);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// GCC does not know that a tile is read from memory: without this, what was to be written before may come after.
#define LOAD_TILE(tile, from, bytes) \
  do { \
    asm volatile("" ::: "memory"); \
    _tile_loadd(tile, from, bytes); \
  } while (false)

// Two rows of 16 numbers, the first `count` of them, as pairs.
static inline __m512i pairs_of(const Stored* low, const Stored* high, int64_t count = SIDE) {
  __mmask16 is_there = count >= SIDE ? 0xffff : (1 << count) - 1;
  __m512i first = low ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_there, low)) : __m512i{};
  __m512i second = high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_there, high)) : __m512i{};
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

// tile[feature][i] = the pair of the tokens 2 i and 2 i + 1, of 2 SIDE; those that are not there are zeros.
static void read_token_pairs(Pair* tile, const Stored* matrix, int64_t stride, int64_t tokens, int64_t features) {
  for (int64_t first = 0; first < features; first += SIDE) {
    Tokens square[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) {
      const Stored* low = 2 * i < tokens ? matrix + 2 * i * stride + first : nullptr;
      const Stored* high = 2 * i + 1 < tokens ? matrix + (2 * i + 1) * stride + first : nullptr;
      square[i] = (Tokens)pairs_of(low, high, features - first);
    }
    transpose(square);
    memcpy(tile + first * SIDE, square, sizeof square);
  }
}

// tile[i][token] = the pair of the features 2 i and 2 i + 1, of SIDE tokens; what is not there is zeros.
static void read_feature_pairs(Pair* tile, const Stored* matrix, int64_t stride, int64_t tokens, int64_t features) {
  for (int64_t first = 0; first < features; first += 2 * SIDE) {
    int64_t count = features - first;
    __mmask32 is_there = count >= 2 * SIDE ? 0xffffffff : (1u << count) - 1;
    Tokens square[SIDE];
#pragma GCC unroll 16
    for (int token = 0; token < SIDE; token++)
      square[token] = token < tokens ? (Tokens)_mm512_maskz_loadu_epi16(is_there, matrix + token * stride + first)
                                     : Tokens{};
    transpose(square);
    memcpy(tile + first / 2 * SIDE, square, sizeof square);
  }
}

static inline Tokens widened(const Stored* from, int64_t count) {
  return from ? (Tokens)_mm512_slli_epi32(pairs_of(from, nullptr, count), 16) : Tokens{};
}

static inline void put_row(Stored* to, Tokens value, int64_t width) {
  __mmask16 is_there = width >= SIDE ? 0xffff : (1 << width) - 1;
  _mm256_mask_storeu_epi16(to, is_there, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}

static inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

extern "C" void product(
    const Stored* hidden, int64_t hidden_stride, const Stored* factor, int64_t factor_stride, int64_t rank,
    const Stored* bias, const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y,
    int64_t y_stride, int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  constexpr int64_t TOKENS = 2 * SIDE, ROW_PARTS = VECTOR / SIDE;
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + TOKENS - 1) / TOKENS;
  // Equal steps of at most 32 groups, the length of a tile register's row.
  int64_t steps = steps_of(groups, 2 * SIDE), pairs = (steps_of(groups, steps) + 1) / 2, step = 2 * pairs;
  int64_t padded = rounded_up(rank, 2 * SIDE), rank_steps = padded / (2 * SIDE);
  // [block][part][step][row of the part][group of the step], and the factor with zeros around it
  auto packed = memory<Stored>(blocks * VECTOR * steps * step), whole = memory<Stored>(blocks * VECTOR * padded);
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < blocks * ROW_PARTS; part++)
    for (int64_t row = 0; row < SIDE; row++) {
      int64_t at = part * SIDE + row;
      for (int64_t group = 0; group < steps * step; group++)
        packed[((part * steps + group / step) * SIDE + row) * step + group % step] =
            at < rows && group < groups ? values[at * groups + group] : 0;
      Stored* to = whole.get() + at * padded;
      memset(to, 0, padded * sizeof(Stored));
      if (at < rows) memcpy(to, factor + at * factor_stride, rank * sizeof(Stored));
    }
  int64_t shares = tiles >= 2 * threads ? 1 : std::min<int64_t>(threads, blocks);
#pragma omp parallel num_threads(threads)
  {
    Tiles registers(SIDE, pairs);
    auto tile = memory<Pair>(rounded_up(features, SIDE) * SIDE), gathered = memory<Pair>(steps * step * SIDE);
    auto of_even = memory<Pair>(padded / 2 * SIDE), of_odd = memory<Pair>(padded / 2 * SIDE);
    auto sums = memory<float>(2 * SIDE * SIDE);
#pragma omp for collapse(2)
    for (int64_t i = 0; i < tiles; i++)
      for (int64_t share = 0; share < shares; share++) {
        const Stored* x_tile = x + i * TOKENS * x_stride;
        Stored* y_tile = y + i * TOKENS * y_stride;
        int64_t there = std::min<int64_t>(TOKENS, tokens - i * TOKENS);
        read_token_pairs(tile.get(), x_tile, x_stride, there, features);
        const Stored* of_tile = hidden + i * TOKENS * hidden_stride;
        read_feature_pairs(of_even.get(), of_tile, 2 * hidden_stride, (there + 1) / 2, rank);
        read_feature_pairs(of_odd.get(), of_tile + hidden_stride, 2 * hidden_stride, there / 2, rank);
        for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; block++) {
          for (int64_t half : {TOKENS, TOKENS + SIDE})
            if (i * TOKENS + half + SIDE <= tokens) fetch(x_tile + half * x_stride, x_stride, features, block, blocks);
          // Pairs of tokens become pairs of groups, of the even tokens and of the odd ones.
          const int32_t* column = columns + block * groups;
          for (int64_t group = 0; group < steps * step; group += 2) {
            __m512i first{}, second{};
            if (group < groups) first = _mm512_load_si512(tile.get() + int64_t(column[group]) * SIDE);
            if (group + 1 < groups) second = _mm512_load_si512(tile.get() + int64_t(column[group + 1]) * SIDE);
            Pair* to = gathered.get() + (group / step * step + group % step / 2) * SIDE;
            const __m512i low = _mm512_set1_epi32(0xffff);
            // 0xca takes the next argument's bits where the mask has ones, the last one's elsewhere.
            _mm512_store_si512(to, _mm512_ternarylogic_epi32(low, first, _mm512_slli_epi32(second, 16), 0xca));
            _mm512_store_si512(
                to + pairs * SIDE, _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(first, 16), second, 0xca));
          }
          for (int64_t part = 0; part < ROW_PARTS; part++) {
            int64_t row = block * VECTOR + part * SIDE, width = std::min<int64_t>(SIDE, rows - row);
            if (width <= 0) break;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t s = 0; s < rank_steps; s++) {
              LOAD_TILE(5, whole.get() + row * padded + s * 2 * SIDE, padded * sizeof(Stored));
              LOAD_TILE(6, of_even.get() + s * SIDE * SIDE, SIDE * sizeof(Pair));
              LOAD_TILE(7, of_odd.get() + s * SIDE * SIDE, SIDE * sizeof(Pair));
              _tile_dpbf16ps(0, 5, 6);
              _tile_dpbf16ps(1, 5, 7);
            }
            const Stored* value = packed.get() + row * steps * step;
            for (int64_t s = 0; s < steps; s++) {
              const Pair* of_step = gathered.get() + s * step * SIDE;
              LOAD_TILE(4, value + s * SIDE * step, step * sizeof(Stored));
              LOAD_TILE(2, of_step, SIDE * sizeof(Pair));
              LOAD_TILE(3, of_step + pairs * SIDE, SIDE * sizeof(Pair));
              _tile_dpbf16ps(0, 4, 2);
              _tile_dpbf16ps(1, 4, 3);
            }
            _tile_stored(0, sums.get(), SIDE * sizeof(float));
            _tile_stored(1, sums.get() + SIDE * SIDE, SIDE * sizeof(float));
            Tokens added = widened(bias ? bias + row : nullptr, width);
            for (int64_t odd : {0, 1}) {
              Tokens square[SIDE];
              memcpy(square, sums.get() + odd * SIDE * SIDE, sizeof square);
              transpose(square);
#pragma GCC unroll 16
              for (int i = 0; i < SIDE; i++)
                if (2 * i + odd < there) put_row(y_tile + (2 * i + odd) * y_stride + row, square[i] + added, width);
            }
          }
        }
      }
  }
}

extern "C" void transposed(
    const Stored* hidden, int64_t hidden_stride, const Stored* factor, int64_t factor_stride, int64_t rank,
    const Stored* bias, const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y,
    int64_t y_stride, int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  constexpr int64_t PAIRS = (VECTOR < 2 * SIDE ? VECTOR : 2 * SIDE) / 2, ROW_PARTS = VECTOR / (2 * PAIRS);
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + SIDE - 1) / SIDE;
  int64_t steps = steps_of(groups, SIDE), step = steps_of(groups, steps);
  // [block][step][part][group of the step][row of the part]
  auto packed = memory<Stored>(blocks * steps * step * VECTOR);
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t group = 0; group < steps * step; group++)
      for (int64_t row = 0; row < VECTOR; row++) {
        int64_t at = block * VECTOR + row, part = row / (2 * PAIRS);
        packed[((((block * steps + group / step) * ROW_PARTS + part) * step) + group % step) * 2 * PAIRS +
               row % (2 * PAIRS)] = at < rows && group < groups ? values[at * groups + group] : 0;
      }
  // [step][column][pair of ranks]
  int64_t padded = rounded_up(features, SIDE), rank_steps = steps_of(rank, 2 * SIDE);
  auto whole = memory<Pair>(rank_steps * padded * SIDE);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t s = 0; s < rank_steps; s++)
    for (int64_t first = 0; first < features; first += SIDE) {
      const Stored* from = factor + s * 2 * SIDE * factor_stride + first;
      int64_t ranks = std::min<int64_t>(2 * SIDE, rank - s * 2 * SIDE);
      read_token_pairs(
          whole.get() + (s * padded + first) * SIDE, from, factor_stride, ranks,
          std::min<int64_t>(SIDE, features - first));
    }
#pragma omp parallel num_threads(threads)
  {
    Tiles registers(step, PAIRS);
    int64_t size = rounded_up(blocks * VECTOR, 2 * SIDE) / 2 * SIDE;
    auto tile = memory<Pair>(size);
    auto result = memory<float>(padded * SIDE), sums = memory<float>(SIDE * SIDE);
    auto of_tile = memory<Pair>(rank_steps * SIDE * SIDE);
    memset(tile.get(), 0, size * sizeof(Pair));
#pragma omp for
    for (int64_t i = 0; i < tiles; i++) {
      int64_t there = std::min<int64_t>(SIDE, tokens - i * SIDE);
      read_feature_pairs(tile.get(), x + i * SIDE * x_stride, x_stride, there, rows);
      read_feature_pairs(of_tile.get(), hidden + i * SIDE * hidden_stride, hidden_stride, there, rank);
      for (int64_t first = 0; first < features; first += SIDE) {
        _tile_zero(1);
        for (int64_t s = 0; s < rank_steps; s++) {
          LOAD_TILE(5, whole.get() + (s * padded + first) * SIDE, SIDE * sizeof(Pair));
          LOAD_TILE(6, of_tile.get() + s * SIDE * SIDE, SIDE * sizeof(Pair));
          _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(1, result.get() + first * SIDE, SIDE * sizeof(float));
      }
      for (int64_t block = 0; block < blocks; block++) {
        if ((i + 2) * SIDE <= tokens) fetch(x + (i + 1) * SIDE * x_stride, x_stride, rows, block, blocks);
        const Pair* of_block = tile.get() + block * VECTOR / 2 * SIDE;
        for (int64_t s = 0; s < steps; s++) {
          const Stored* value = packed.get() + (block * steps + s) * step * VECTOR;
          _tile_zero(0);
          for (int64_t part = 0; part < ROW_PARTS; part++) {
            LOAD_TILE(4, value + part * step * 2 * PAIRS, 2 * PAIRS * sizeof(Stored));
            LOAD_TILE(2, of_block + part * PAIRS * SIDE, SIDE * sizeof(Pair));
            _tile_dpbf16ps(0, 4, 2);
          }
          _tile_stored(0, sums.get(), SIDE * sizeof(float));
          const int32_t* column = columns + block * groups + s * step;
          for (int64_t group = 0; group < std::min(step, groups - s * step); group++) {
            Tokens* to = (Tokens*)(result.get() + int64_t(column[group]) * SIDE);
            *to += *(const Tokens*)(sums.get() + group * SIDE);
          }
        }
      }
      for (int64_t first = 0; first < features; first += SIDE) {
        Tokens square[SIDE], added = widened(bias ? bias + first : nullptr, features - first);
        memcpy(square, result.get() + first * SIDE, sizeof square);
        transpose(square);
#pragma GCC unroll 16
        for (int token = 0; token < SIDE; token++)
          if (token < there) put_row(y + (i * SIDE + token) * y_stride + first, square[token] + added, features - first);
      }
    }
  }
}

extern "C" void dots_amx(
    const Stored* left, int64_t left_stride, const Stored* right, int64_t right_stride, const int32_t* columns,
    float* result, int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  constexpr int64_t TOKENS = 2 * SIDE, ROW_PARTS = VECTOR / SIDE;
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + TOKENS - 1) / TOKENS;
  int64_t steps = steps_of(groups, SIDE), step = steps_of(groups, steps);
  // Of the tokens; each is summed by itself. More than a few would take much memory.
  int64_t pieces = std::max<int64_t>(1, std::min<int64_t>({threads, 8, tiles}));
  int64_t shares = std::min<int64_t>((threads + pieces - 1) / pieces, std::max<int64_t>(blocks, 1));
  int64_t of_block = steps * step * VECTOR, size = blocks * of_block;
  auto partial = memory<float>(pieces * size);  // of a piece [block][step][part][group of the step][row of the part]
#pragma omp parallel num_threads(threads)
  {
    Tiles registers(step, SIDE);
    auto tile = memory<Pair>(rounded_up(features, SIDE) * SIDE), gathered = memory<Pair>(steps * step * SIDE);
    auto rows_of = memory<Pair>(ROW_PARTS * SIDE * SIDE);
    memset(gathered.get(), 0, steps * step * SIDE * sizeof(Pair));
#pragma omp for collapse(2)
    for (int64_t piece = 0; piece < pieces; piece++)
      for (int64_t share = 0; share < shares; share++) {
        int64_t begin = blocks * share / shares, end = blocks * (share + 1) / shares;
        float* sum = partial.get() + piece * size;
        memset(sum + begin * of_block, 0, (end - begin) * of_block * sizeof(float));
        for (int64_t i = tiles * piece / pieces; i < tiles * (piece + 1) / pieces; i++) {
          int64_t there = std::min<int64_t>(TOKENS, tokens - i * TOKENS);
          const Stored* left_tile = left + i * TOKENS * left_stride;
          const Stored* right_tile = right + i * TOKENS * right_stride;
          read_token_pairs(tile.get(), right_tile, right_stride, there, features);
          for (int64_t block = begin; block < end; block++) {
            for (int64_t half : {TOKENS, TOKENS + SIDE})
              if (i * TOKENS + half + SIDE <= tokens)
                fetch(right_tile + half * right_stride, right_stride, features, block - begin, end - begin);
            for (int64_t part = 0; part < ROW_PARTS; part++) {
              int64_t first = block * VECTOR + part * SIDE;
              for (int64_t i = 0; i < SIDE; i++) {
                const Stored* low = 2 * i < there ? left_tile + 2 * i * left_stride + first : nullptr;
                const Stored* high = 2 * i + 1 < there ? left_tile + (2 * i + 1) * left_stride + first : nullptr;
                Pair* to = rows_of.get() + (part * SIDE + i) * SIDE;
                _mm512_store_si512(to, first < rows ? pairs_of(low, high, rows - first) : __m512i{});
              }
            }
            for (int64_t group = 0; group < groups; group++) {
              const Pair* of_column = tile.get() + int64_t(columns[block * groups + group]) * SIDE;
              _mm512_store_si512(gathered.get() + group * SIDE, _mm512_load_si512(of_column));
            }
            for (int64_t s = 0; s < steps; s++)
              for (int64_t part = 0; part < ROW_PARTS; part++) {
                // A tile's sum is added to that of the tiles before it.
                float* to = sum + block * of_block + (s * ROW_PARTS + part) * step * SIDE;
                LOAD_TILE(0, to, SIDE * sizeof(float));
                LOAD_TILE(4, gathered.get() + s * step * SIDE, SIDE * sizeof(Pair));
                LOAD_TILE(2, rows_of.get() + part * SIDE * SIDE, SIDE * sizeof(Pair));
                _tile_dpbf16ps(0, 4, 2);
                _tile_stored(0, to, SIDE * sizeof(float));
              }
          }
        }
      }
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      for (int64_t group = 0; group < groups; group++) {
        int64_t part = row % VECTOR / SIDE, step_of = group / step;
        int64_t at = row / VECTOR * of_block + ((step_of * ROW_PARTS + part) * step + group % step) * SIDE + row % SIDE;
        float sum = 0;
        for (int64_t piece = 0; piece < pieces; piece++) sum += partial[piece * size + at];
        result[row * groups + group] = sum;
      }
  }
}
#endif
