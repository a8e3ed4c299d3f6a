// S of the vector support on CPU: blocks of VECTOR rows that share their columns, times matrices with a row a token.
//
//   product_of_few   y_TN = hidden_TR @ factor_NR^T + x_TK @ S_NK^T + bias_N
//   add_product      y_TN += x_TK @ S_NK^T
//   add_transposed   y_TK += x_TN @ S_NK
//   dots             result_NG = left_TN^T @ right_TK, at the support
//
// T tokens, N rows, K columns ("features" is what a token has of them), G groups of a row. `values` is [N, G] and
// `columns` [ceil(N / VECTOR), G]. Before this text stand two definitions: VECTOR, and STORED, which is what matrices
// hold: 0 float, 1 double, 2 bfloat16. Sums are float or double, and are rounded as they are added to y. The sums of
// each element are made in one order, whatever the number of threads, but for `dots`, where a thread has its tokens.
//
// A tile is as many tokens as a vector register has lanes. It is transposed as it is read, [features, LANES]: then the
// tokens of a feature are one line of the cache, whichever features the support asks for.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <omp.h>

// Inductor's flags forbid to fuse a product and a sum.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 16;
#elif defined(__AVX2__)
constexpr int BYTES = 32, SUMS = 8;
#else
constexpr int BYTES = 16, SUMS = 8;
#endif

#if STORED == 1
using Sum = double;
using Bits = uint64_t;
using Stored = double;
#else
using Sum = float;
using Bits = uint32_t;
#if STORED == 0
using Stored = float;
#else
using Stored = uint16_t;
#endif
#endif

constexpr int LANES = BYTES / sizeof(Sum);            // tokens of a tile
constexpr int WIDE = VECTOR < LANES ? VECTOR : LANES;  // rows of a vector
constexpr int PARTS = VECTOR / WIDE;                   // vectors of a block of rows

template <typename T, int N> struct Lanes {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
using Tokens = Lanes<Sum, LANES>::type;
using Rows = Lanes<Sum, WIDE>::type;

static inline Sum widen(Stored value) {
#if STORED == 2
  uint32_t bits = uint32_t(value) << 16;
  Sum result;
  memcpy(&result, &bits, sizeof result);
  return result;
#else
  return value;
#endif
}

static inline Stored narrow(Sum value) {
#if STORED == 2
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return Stored((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
  return value;
#endif
}

template <typename Vector, int N> static inline Vector load(const Stored* from) {
  typename Lanes<Stored, N>::type stored;
  memcpy(&stored, from, sizeof stored);
#if STORED == 2
  typename Lanes<uint32_t, N>::type bits = __builtin_convertvector(stored, typename Lanes<uint32_t, N>::type) << 16;
  return (Vector)bits;
#else
  return stored;
#endif
}

template <typename Vector, int N> static inline void store(Stored* to, Vector value) {
#if STORED == 2
  using Wide = typename Lanes<uint32_t, N>::type;
  Wide bits = (Wide)value;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = value == value ? bits : Wide{} + 0x7fc0;
  auto stored = __builtin_convertvector(bits, typename Lanes<Stored, N>::type);
#else
  auto stored = value;
#endif
  memcpy(to, &stored, sizeof stored);
}

static inline Rows rows_at(const Sum* from) {
  Rows value;
  memcpy(&value, from, sizeof value);
  return value;
}

static inline void put_rows(Sum* to, Rows value) { memcpy(to, &value, sizeof value); }

struct Free {
  void operator()(void* memory) const { free(memory); }
};
template <typename T> using Memory = std::unique_ptr<T[], Free>;

template <typename T> static Memory<T> memory(int64_t count) {
  return Memory<T>((T*)aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64));
}

// LANES rounds of this exchange rows and columns of a square: the rows 2 i and 2 i + 1 are i and i + LANES / 2, mixed.
static inline void transpose(Tokens (&square)[LANES]) {
  using Index = Lanes<Bits, LANES>::type;
  Index low, high;
  for (int lane = 0; lane < LANES; lane++) {
    low[lane] = lane / 2 + lane % 2 * LANES;
    high[lane] = low[lane] + LANES / 2;
  }
#pragma GCC unroll 8
  for (int round = 1; round < LANES; round *= 2) {
    Tokens mixed[LANES];
#pragma GCC unroll 16
    for (int row = 0; row < LANES / 2; row++) {
      mixed[2 * row] = __builtin_shuffle(square[row], square[row + LANES / 2], low);
      mixed[2 * row + 1] = __builtin_shuffle(square[row], square[row + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) square[row] = mixed[row];
  }
}

// tile[feature][token] = matrix[token][feature]; the tokens that are not there are zeros.
static void read_tile(Sum* tile, const Stored* matrix, int64_t stride, int64_t tokens, int64_t features) {
  int64_t first = 0;
  for (; first + LANES <= features; first += LANES) {
    Tokens square[LANES];
#pragma GCC unroll 16
    for (int token = 0; token < LANES; token++)
      square[token] = token < tokens ? load<Tokens, LANES>(matrix + token * stride + first) : Tokens{};
    transpose(square);
    memcpy(tile + first * LANES, square, sizeof square);
  }
  for (; first < features; first++)
    for (int token = 0; token < LANES; token++)
      tile[first * LANES + token] = token < tokens ? widen(matrix[token * stride + first]) : 0;
}

// matrix[token][feature] += tile[feature][token].
static void add_tile(const Sum* tile, Stored* matrix, int64_t stride, int64_t tokens, int64_t features) {
  int64_t first = 0;
  for (; first + LANES <= features; first += LANES) {
    Tokens square[LANES];
    memcpy(square, tile + first * LANES, sizeof square);
    transpose(square);
#pragma GCC unroll 16
    for (int token = 0; token < LANES; token++)
      if (token < tokens) {
        Stored* to = matrix + token * stride + first;
        store<Tokens, LANES>(to, load<Tokens, LANES>(to) + square[token]);
      }
  }
  for (; first < features; first++)
    for (int token = 0; token < tokens; token++) {
      Stored& to = matrix[token * stride + first];
      to = narrow(widen(to) + tile[first * LANES + token]);
    }
}

// Asks for a share of what the next tile reads or writes, so that it is in the cache by then: rows are far apart, which
// the processor does not foresee.
static inline void fetch(const Stored* matrix, int64_t stride, int64_t features, int64_t share, int64_t shares) {
  constexpr int64_t LINE = 64 / sizeof(Stored);
  int64_t begin = features * share / shares, end = features * (share + 1) / shares;
  for (int64_t first = begin; first < end; first += LINE)
    for (int token = 0; token < LANES; token++) __builtin_prefetch(matrix + token * stride + first, 0, 2);
}

// packed[block][group][row of the block]; rows and groups that are not there are zeros.
static Memory<Sum> pack(const Stored* values, int64_t rows, int64_t groups, int64_t padded, int threads) {
  int64_t blocks = (rows + VECTOR - 1) / VECTOR;
  auto packed = memory<Sum>(blocks * padded * VECTOR);
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t group = 0; group < padded; group++)
      for (int64_t row = 0; row < VECTOR; row++) {
        int64_t at = block * VECTOR + row;
        bool is_there = at < rows && group < groups;
        packed[(block * padded + group) * VECTOR + row] = is_there ? widen(values[at * groups + group]) : 0;
      }
  return packed;
}

// Groups are taken in equal steps of at most this many, an even number.
constexpr int STEP = SUMS / PARTS > 2 ? SUMS / PARTS : 2;

static inline int64_t steps_of(int64_t groups, int64_t most) { return (groups + most - 1) / most; }

template <int N> struct Count {
  static constexpr int value = N;
};

// Calls with the smallest even constant that is no less than count.
template <int MOST, typename Function> static inline void with_constant(int64_t count, Function function) {
  if constexpr (MOST > 2)
    if (count <= MOST - 2) return with_constant<MOST - 2>(count, function);
  function(Count<MOST>{});
}

constexpr int FEW_TOKENS = 4;  // up to so many, `add_transposed` reads values as they lie, and does not pack them

// The first `count` of N elements, zeros behind them. `room` of them may be read.
static inline Tokens load_some(const Stored* from, int64_t count, int64_t room) {
  Tokens value{};
  if (room >= LANES) {
    using Index = Lanes<Bits, LANES>::type;
    Index lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    // Not multiplied by zero: what lies behind may be infinite.
    return count >= LANES ? load<Tokens, LANES>(from) : lane < Bits(count) ? load<Tokens, LANES>(from) : value;
  }
  for (int64_t i = 0; i < count; i++) value[i] = widen(from[i]);
  return value;
}

constexpr int64_t AHEAD = 2048 / sizeof(Stored);  // asked for before it is read: the processor alone asks too late

// sums[token] += the products of a row's `count` elements with those of a token, `with` + token * `stride`, behind which
// are zeros up to a whole number of LANES. `room` elements of the row may be read.
template <int TOKENS>
static inline void add_products(
    Tokens (&sums)[TOKENS], const Stored* row, int64_t count, int64_t room, const Sum* with, int64_t stride) {
  int64_t at = 0;
  auto add = [&](Tokens part) {
#pragma GCC unroll 16
    for (int token = 0; token < TOKENS; token++) sums[token] += part * *(const Tokens*)(with + token * stride + at);
  };
  for (; at + LANES <= count; at += LANES) {
    __builtin_prefetch(row + at + AHEAD);
    add(load<Tokens, LANES>(row + at));
  }
  if (at < count) add(load_some(row + at, count - at, room - at));
}

// y_TN = hidden_TR @ factor_NR^T + x_TK @ S_NK^T + bias_N of at most 16 tokens. Factor and values are read once, as they
// lie; for up to some 8 tokens that is what takes the time.
extern "C" void product_of_few(
    const Stored* hidden, int64_t hidden_stride, const Stored* factor, int64_t factor_stride, int64_t rank,
    const Stored* bias, const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y,
    int64_t y_stride, int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  int64_t of_rank = steps_of(rank, LANES) * LANES, of_groups = steps_of(groups, LANES) * LANES;
  with_constant<16>(tokens, [&](auto constant) {
    constexpr int TOKENS = decltype(constant)::value;
    auto widened = memory<Sum>(TOKENS * of_rank);
    memset(widened.get(), 0, TOKENS * of_rank * sizeof(Sum));
    for (int64_t token = 0; token < tokens; token++)
      for (int64_t i = 0; i < rank; i++) widened[token * of_rank + i] = widen(hidden[token * hidden_stride + i]);
#pragma omp parallel num_threads(threads)
    {
      auto gathered = memory<Sum>(TOKENS * of_groups);
      memset(gathered.get(), 0, TOKENS * of_groups * sizeof(Sum));
#pragma omp for
      for (int64_t first = 0; first < rows; first += LANES) {
        int64_t there = std::min<int64_t>(LANES, rows - first);
        Tokens sums[TOKENS][LANES] = {};
        for (int64_t i = 0; i < there; i++) {
          int64_t row = first + i, below = rows - 1 - row;
          const int32_t* column = columns + row / VECTOR * groups;
          if (i == 0 || row % VECTOR == 0)
            for (int64_t token = 0; token < tokens; token++)
              for (int64_t group = 0; group < groups; group++)
                gathered[token * of_groups + group] = widen(x[token * x_stride + column[group]]);
          Tokens of_row[TOKENS] = {};
          add_products(of_row, factor + row * factor_stride, rank, below * factor_stride + rank, widened.get(), of_rank);
          add_products(of_row, values + row * groups, groups, (below + 1) * groups, gathered.get(), of_groups);
#pragma GCC unroll 16
          for (int token = 0; token < TOKENS; token++) sums[token][i] = of_row[token];
        }
        for (int64_t token = 0; token < tokens; token++) {
          transpose(sums[token]);
#pragma GCC unroll 4
          for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 16
            for (int i = 0; i < half; i++) sums[token][i] += sums[token][i + half];
          for (int64_t i = 0; i < there; i++)
            y[token * y_stride + first + i] = narrow(sums[token][0][i] + (bias ? widen(bias[first + i]) : 0));
        }
      }
    }
  });
}

static void add_transposed_of_few(
    const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y, int64_t y_stride,
    int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  int64_t blocks = (rows + VECTOR - 1) / VECTOR;
#pragma omp parallel num_threads(threads)
  {
    auto result = memory<Sum>(features);
    // Groups are ranges of columns, so that no two threads add to the same one.
#pragma omp for collapse(2)
    for (int64_t token = 0; token < tokens; token++)
      for (int64_t first = 0; first < groups; first += LANES) {
        int64_t count = std::min<int64_t>(LANES, groups - first);
        int64_t begin = first * features / groups, end = (first + count) * features / groups;
        std::fill(result.get() + begin, result.get() + end, Sum(0));
        for (int64_t block = 0; block < blocks; block++) {
          Tokens sums{};
          for (int64_t row = block * VECTOR; row < std::min<int64_t>((block + 1) * VECTOR, rows); row++) {
            const Stored* from = values + row * groups + first;
            sums += widen(x[token * x_stride + row]) * load_some(from, count, (rows - row) * groups - first);
          }
          for (int64_t group = 0; group < count; group++)
            result[columns[block * groups + first + group]] += sums[group];
        }
        for (int64_t column = begin; column < end; column++) {
          Stored& to = y[token * y_stride + column];
          to = narrow(widen(to) + result[column]);
        }
      }
  }
}

extern "C" void add_product(
    const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y, int64_t y_stride,
    int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + LANES - 1) / LANES;
  auto packed = pack(values, rows, groups, groups, threads);
  int64_t shares = tiles >= 2 * threads ? 1 : std::min<int64_t>(threads, blocks);
  constexpr int FEW = SUMS / PARTS > 1 ? SUMS / PARTS : 1;  // tokens whose sums are in registers
  constexpr int HELD = FEW < LANES ? FEW : LANES;
#pragma omp parallel num_threads(threads)
  {
    auto tile = memory<Sum>(features * LANES);
#pragma omp for collapse(2)
    for (int64_t i = 0; i < tiles; i++)
      for (int64_t share = 0; share < shares; share++) {
        const Stored* x_tile = x + i * LANES * x_stride;
        Stored* y_tile = y + i * LANES * y_stride;
        int64_t there = std::min<int64_t>(LANES, tokens - i * LANES);
        read_tile(tile.get(), x_tile, x_stride, there, features);
        for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; block++) {
          if (i + 1 < tiles) {
            fetch(x_tile + LANES * x_stride, x_stride, features, block, blocks);
            fetch(y_tile + LANES * y_stride, y_stride, rows, block, blocks);
          }
          const Sum* value = packed.get() + block * groups * VECTOR;
          const int32_t* column = columns + block * groups;
          int64_t width = std::min<int64_t>(VECTOR, rows - block * VECTOR);
          for (int64_t first = 0; first < there; first += HELD) {
            Rows sums[HELD][PARTS] = {};
            for (int64_t group = 0; group < groups; group++) {
              const Sum* of_column = tile.get() + int64_t(column[group]) * LANES + first;
              Rows part[PARTS];
#pragma GCC unroll 64
              for (int n = 0; n < PARTS; n++) part[n] = rows_at(value + group * VECTOR + n * WIDE);
#pragma GCC unroll 16
              for (int token = 0; token < HELD; token++)
#pragma GCC unroll 64
                for (int n = 0; n < PARTS; n++) sums[token][n] += of_column[token] * part[n];
            }
#pragma GCC unroll 16
            for (int token = 0; token < HELD; token++) {
              if (first + token >= there) break;
              Stored* to = y_tile + (first + token) * y_stride + block * VECTOR;
              if (width == VECTOR) {
#pragma GCC unroll 64
                for (int n = 0; n < PARTS; n++)
                  store<Rows, WIDE>(to + n * WIDE, load<Rows, WIDE>(to + n * WIDE) + sums[token][n]);
              } else {
                for (int64_t row = 0; row < width; row++)
                  to[row] = narrow(widen(to[row]) + sums[token][row / WIDE][row % WIDE]);
              }
            }
          }
        }
      }
  }
}

extern "C" void add_transposed(
    const Stored* x, int64_t x_stride, const Stored* values, const int32_t* columns, Stored* y, int64_t y_stride,
    int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  if (tokens <= FEW_TOKENS)
    return add_transposed_of_few(x, x_stride, values, columns, y, y_stride, tokens, rows, features, groups, threads);
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + LANES - 1) / LANES;
  int64_t steps = steps_of(groups, SUMS), step = (groups + steps - 1) / steps;
  auto packed = pack(values, rows, groups, groups + 1, threads);
#pragma omp parallel num_threads(threads)
  {
    auto tile = memory<Sum>(blocks * VECTOR * LANES), result = memory<Sum>(features * LANES);
    memset(tile.get(), 0, blocks * VECTOR * LANES * sizeof(Sum));
#pragma omp for
    for (int64_t i = 0; i < tiles; i++) {
      int64_t there = std::min<int64_t>(LANES, tokens - i * LANES);
      read_tile(tile.get(), x + i * LANES * x_stride, x_stride, there, rows);
      memset(result.get(), 0, features * LANES * sizeof(Sum));
      for (int64_t block = 0; block < blocks; block++) {
        if (i + 1 < tiles) {
          fetch(x + (i + 1) * LANES * x_stride, x_stride, rows, block, blocks);
          fetch(y + i * LANES * y_stride, y_stride, features, block, blocks);
        }
        for (int64_t first = 0; first < groups; first += step) {
          int64_t count = std::min(step, groups - first);
          const Sum* value = packed.get() + (block * (groups + 1) + first) * VECTOR;
          const int32_t* column = columns + block * groups + first;
          const Sum* row = tile.get() + block * VECTOR * LANES;
          with_constant<SUMS>(count, [&](auto constant) {
            constexpr int N = decltype(constant)::value;
            Tokens sums[N] = {};
            for (int i = 0; i < VECTOR; i++) {
              Tokens of_row;
              memcpy(&of_row, row + i * LANES, sizeof of_row);
#pragma GCC unroll 16
              for (int n = 0; n < N; n++) sums[n] += value[n * VECTOR + i] * of_row;
            }
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
              if (n >= count) break;
              Tokens* to = (Tokens*)(result.get() + int64_t(column[n]) * LANES);
              *to += sums[n];
            }
          });
        }
      }
      add_tile(result.get(), y + i * LANES * y_stride, y_stride, there, features);
    }
  }
}

extern "C" void dots(
    const Stored* left, int64_t left_stride, const Stored* right, int64_t right_stride, const int32_t* columns,
    Sum* result, int64_t tokens, int64_t rows, int64_t features, int64_t groups, int64_t threads) {
  int64_t blocks = (rows + VECTOR - 1) / VECTOR, tiles = (tokens + LANES - 1) / LANES;
  constexpr int MOST = STEP;
  int64_t steps = steps_of(groups, MOST), step = (groups + steps - 1) / steps, padded = steps * step + 1;
  // Of the tokens; each is summed by itself. More than a few would take much memory.
  int64_t pieces = std::max<int64_t>(1, std::min<int64_t>({threads, 8, tiles}));
  int64_t shares = std::min<int64_t>((threads + pieces - 1) / pieces, std::max<int64_t>(blocks, 1));
  int64_t size = blocks * padded * VECTOR;
  auto partial = memory<Sum>(pieces * size);
#pragma omp parallel num_threads(threads)
  {
    auto tile = memory<Sum>(features * LANES);
#pragma omp for collapse(2)
    for (int64_t piece = 0; piece < pieces; piece++)
      for (int64_t share = 0; share < shares; share++) {
        int64_t begin = blocks * share / shares, end = blocks * (share + 1) / shares;
        Sum* sum = partial.get() + piece * size;
        memset(sum + begin * padded * VECTOR, 0, (end - begin) * padded * VECTOR * sizeof(Sum));
        for (int64_t i = tiles * piece / pieces; i < tiles * (piece + 1) / pieces; i++) {
          int64_t there = std::min<int64_t>(LANES, tokens - i * LANES);
          read_tile(tile.get(), right + i * LANES * right_stride, right_stride, there, features);
          for (int64_t block = begin; block < end; block++) {
            const Stored* of_block = left + i * LANES * left_stride + block * VECTOR;
            int64_t width = std::min<int64_t>(VECTOR, rows - block * VECTOR), stride = left_stride;
            Stored copied[LANES * VECTOR];
            if (i + 1 < tiles) {
              fetch(right + (i + 1) * LANES * right_stride, right_stride, features, block - begin, end - begin);
              fetch(of_block + LANES * left_stride, left_stride, VECTOR, 0, 1);
            }
            if (width < VECTOR) {  // a load of the last block's whole width would read beyond it
              memset(copied, 0, sizeof copied);
              for (int64_t token = 0; token < there; token++)
                memcpy(copied + token * VECTOR, of_block + token * left_stride, width * sizeof(Stored));
              of_block = copied, stride = VECTOR;
            }
            for (int64_t first = 0; first < groups; first += step) {
              int64_t count = std::min(step, groups - first);
              const int32_t* column = columns + block * groups + first;
              with_constant<MOST>(count, [&](auto constant) {
                constexpr int N = decltype(constant)::value;
                // Side by side: as many addresses have no room in the registers.
                Sum gathered[N][LANES];
#pragma GCC unroll 16
                for (int n = 0; n < N; n++)
                  memcpy(gathered[n], tile.get() + int64_t(column[n < count ? n : 0]) * LANES, sizeof gathered[n]);
                // A tile's sum is added to that of the tiles before it: closer than one long sum.
                Rows sums[N][PARTS] = {};
                for (int64_t token = 0; token < there; token++) {
                  Rows part[PARTS];
#pragma GCC unroll 64
                  for (int m = 0; m < PARTS; m++) part[m] = load<Rows, WIDE>(of_block + token * stride + m * WIDE);
#pragma GCC unroll 16
                  for (int n = 0; n < N; n++)
#pragma GCC unroll 64
                    for (int m = 0; m < PARTS; m++) sums[n][m] += gathered[n][token] * part[m];
                }
                Sum* to = sum + (block * padded + first) * VECTOR;
#pragma GCC unroll 16
                for (int n = 0; n < N; n++)
                  if (n < count)
#pragma GCC unroll 64
                    for (int m = 0; m < PARTS; m++) {
                      Sum* at = to + n * VECTOR + m * WIDE;
                      put_rows(at, rows_at(at) + sums[n][m]);
                    }
              });
            }
          }
        }
      }
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      for (int64_t group = 0; group < groups; group++) {
        int64_t at = (row / VECTOR * padded + group) * VECTOR + row % VECTOR;
        Sum sum = 0;
        for (int64_t piece = 0; piece < pieces; piece++) sum += partial[piece * size + at];
        result[row * groups + group] = sum;
      }
  }
}
