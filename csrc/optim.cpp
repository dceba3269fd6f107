// The steps of RoutedAdamW on parameters, in one pass over all of them.
#include <vector>

#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

// About how many elements of a parameter are a tile, and the least rows of one whose blocks are columns: its factors
// are looked through once.
constexpr int64_t TILE = 1 << 15;
constexpr int64_t ROWS = 8;

// At least about how often threads are given tiles, and the most tiles at a time.
constexpr int64_t TURNS = 64;
constexpr int64_t LONGEST_TURN = 64;

// So many rows ahead of the one that is looked at, the first elements of a row are asked for.
constexpr int64_t AHEAD = 24;

// A part of a parameter: some of its rows, and some of their columns.
template <class Owner>
struct Tile {
  Owner owner;
  int64_t row, last_row, col, last_col;
};

// The columns [first, first + n) of a row.
struct Run {
  int64_t first, n;
  bool partly;  // not all of the columns are touched
  bool alike;   // all of them have the same factors
};

// Adds the tiles of a matrix, of at most so many columns and at least so many rows.
template <class Owner>
void add_tiles(const Matrix& m, int64_t cols, int64_t rows, const Owner& owner, std::vector<Tile<Owner>>& tiles) {
  if (m.rows == 0 || m.cols == 0) return;
  cols = std::min(m.cols, cols);
  rows = std::max(TILE / cols, rows);
  for (int64_t row = 0; row < m.rows; row += rows)
    for (int64_t col = 0; col < m.cols; col += cols)
      tiles.push_back({owner, row, std::min(row + rows, m.rows), col, std::min(col + cols, m.cols)});
}

template <class Owner>
int64_t elements_of(const Tile<Owner>& tile) {
  return (tile.last_row - tile.row) * (tile.last_col - tile.col);
}

// Calls body(tile) for every tile. All of them share one parallel region, in which a thread takes many tiles that lie
// side by side: one at a time, tiles of two threads took 1.3 times as long. It takes them in several turns, because
// what is not touched takes less time.
template <class Owner, class Body>
void for_tiles(const std::vector<Tile<Owner>>& tiles, const Body& body) {
  std::vector<size_t> starts = {0};
  int64_t elements = 0, total = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    total += elements_of(tiles[i]);
    elements += elements_of(tiles[i]);
    if (elements < TILE && i + 1 < tiles.size()) continue;
    starts.push_back(i + 1);
    elements = 0;
  }
  const int64_t count = starts.size() - 1;
  const int64_t turn = std::clamp<int64_t>(count / TURNS, 1, LONGEST_TURN);
#pragma omp parallel for schedule(dynamic, turn) if (total >= PARALLEL_FROM)
  for (int64_t i = 0; i < count; ++i)
    for (size_t tile = starts[i]; tile < starts[i + 1]; ++tile) body(tiles[tile]);
}

// Calls body with an unsigned integer as wide as an element.
template <class Body>
void switch_size(Dtype dtype, const Body& body) {
  if (dtype == Dtype::float64) return body(uint64_t());
  if (dtype == Dtype::float32) return body(uint32_t());
  body(uint16_t());
}

// A copy of a row's elements, to put back those that are not touched: rounding NaN to halves and back would not keep
// all its bits.
class Kept {
 public:
  void keep(const Matrix& m, int64_t row, const Run& run) {
    switch_size(m.dtype, [&](auto element) {
      using E = decltype(element);
      const E* from = reinterpret_cast<const E*>(address(m, row, run.first, sizeof(E)));
      for (int64_t i = 0; i < run.n; ++i) kept<E>()[i] = from[i * m.col_stride];
    });
  }

  template <class C>
  void put_back(const Matrix& m, int64_t row, const Run& run, const C* touched) {
    switch_size(m.dtype, [&](auto element) {
      using E = decltype(element);
      E* to = reinterpret_cast<E*>(address(m, row, run.first, sizeof(E)));
      for (int64_t i = 0; i < run.n; ++i)
        to[i * m.col_stride] = touched[i] != C(0) ? to[i * m.col_stride] : kept<E>()[i];
    });
  }

 private:
  template <class E>
  E* kept() {
    return reinterpret_cast<E*>(bytes);
  }

  alignas(64) char bytes[BLOCK * sizeof(double)];
};

// Whether memory holds the elements of a matrix's rows side by side, as they are computed with.
template <class C>
bool is_direct(const Matrix& m) {
  return m.data == nullptr || (sizeof(C) == sizeof(float) && m.dtype == Dtype::float32 && m.col_stride == 1);
}

// Stores what `load` gave and a step has changed, unless memory holds it already.
template <class C>
void put(const Matrix& m, int64_t row, int64_t first, int64_t n, const C* values) {
  if (!is_direct<C>(m)) round_into(m, row, first, n, values);
}

template <class C>
struct Step {
  const AdamWTensors* tensors;
  const Matrix* factors;
  const AdamW<C>* options;
  bool stochastic;
  Matrix p, g, m, v, largest;
  int64_t longest;  // the most elements of a row that are updated at once

  Step(const AdamWOperands& operands, const AdamWTensors& tensors, const AdamW<C>& options)
      : tensors(&tensors),
        factors(&operands.factors),
        options(&options),
        stochastic(operands.stochastic),
        p(tensors.parameter),
        g(tensors.gradient),
        m(tensors.exp_avg),
        v(tensors.exp_avg_sq),
        largest(tensors.max_exp_avg_sq) {
    const bool direct =
        is_direct<C>(p) && is_direct<C>(g) && is_direct<C>(m) && is_direct<C>(v) && is_direct<C>(largest);
    longest = direct && !stochastic ? TILE : BLOCK;
  }

  const C* factor(int64_t which, int64_t block) const {
    return reinterpret_cast<const C*>(address(*factors, which, tensors->first + block, sizeof(C)));
  }

  // The elements [row, first .. first + n), whose factors begin at `block` and are `stride` apart: 1, or 0 where all of
  // them belong to one block.
  template <int64_t stride, bool has_largest>
  void update(int64_t row, int64_t first, int64_t n, int64_t block) const {
    alignas(64) C scratch[5][BLOCK];
    uint32_t random[BLOCK];
    const C* gradient = load(g, row, first, n, scratch[0]);
    C* parameter = const_cast<C*>(load(p, row, first, n, scratch[1]));
    C* average = const_cast<C*>(load(m, row, first, n, scratch[2]));
    C* square = const_cast<C*>(load(v, row, first, n, scratch[3]));
    C* most = has_largest ? const_cast<C*>(load(largest, row, first, n, scratch[4])) : nullptr;
    if (stochastic) draw<stride>(n, gradient, parameter, average, square, factor(4, block), random);
    compute<stride, has_largest>(n, block, gradient, parameter, average, square, most);
    if (stochastic) {
      round_by(random, n, 0, average);
      round_by(random, n, 16, square);
      if (has_largest) round_by(random, n, 16, most);
    }
    put(p, row, first, n, parameter);
    put(m, row, first, n, average);
    put(v, row, first, n, square);
    if (has_largest) put(largest, row, first, n, most);
  }

  template <int64_t stride, bool has_largest>
  void compute(int64_t n, int64_t block, const C* gradient, C* parameter, C* average, C* square, C* most) const {
    const C *decay = factor(0, block), *size = factor(1, block), *scale = factor(2, block);
    const BlockFactors<C> alike{*decay, *size, *scale};  // a copy, which stores cannot change
    const AdamW<C> given = *options;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const BlockFactors<C> own = stride == 0 ? alike : BlockFactors<C>{decay[i], size[i], scale[i]};
      C p_new = parameter[i], m_new = average[i], v_new = square[i], largest_new = has_largest ? most[i] : C(0);
      adamw(given, own, has_largest, gradient[i], p_new, m_new, v_new, largest_new);
      parameter[i] = p_new;
      average[i] = m_new;
      square[i] = v_new;
      if (has_largest) most[i] = largest_new;
    }
  }

  template <int64_t stride>
  static void draw(int64_t n, const C* g, const C* p, const C* m, const C* v, const C* count, uint32_t* random) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      random[i] = random_bits(float(g[i]), float(p[i]), float(m[i]), float(v[i]), float(count[i * stride]));
  }

  static void round_by(const uint32_t* random, int64_t n, int shift, C* values) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = C(to_bfloat16_by(random[i] >> shift, float(values[i])));
  }

  // It has one instance, however often it is called: inlined, it doubled the time that this file takes to compile.
  template <int64_t stride>
  __attribute__((noinline)) void update(int64_t row, const Run& run, int64_t block) const {
    for (int64_t done = 0; done < run.n; done += longest) {
      const int64_t first = run.first + done, n = std::min(longest, run.n - done);
      if (largest.data == nullptr)
        update<stride, false>(row, first, n, block + stride * done);
      else
        update<stride, true>(row, first, n, block + stride * done);
    }
  }

  // Whether n columns that are touched have the same factors: their blocks mostly have taken equally many steps.
  bool alike(int64_t first, int64_t n) const {
    for (int64_t which : {0, 1, 2, 4}) {
      const C* values = factor(which, first);
      const C value = *values;
      int64_t others = 0;
#pragma omp simd reduction(+ : others)
      for (int64_t i = 0; i < n; ++i) others += values[i] != value;
      if (others != 0) return false;
    }
    return true;
  }

  // The columns [first, last) in which rows are updated: runs that are touched, or partly.
  std::vector<Run> runs(int64_t first, int64_t last) const {
    if (tensors->blocks != Blocks::columns) return {{first, last - first, false, true}};
    if (alike(first, last - first) && std::count(factor(3, first), factor(3, last), C(1)) == last - first)
      return {{first, last - first, false, true}};
    std::vector<Run> found;
    for (; first < last; first += BLOCK) {
      const int64_t n = std::min(BLOCK, last - first);
      const int64_t touched = std::count(factor(3, first), factor(3, first) + n, C(1));
      if (touched > 0) found.push_back({first, n, touched < n, touched == n && alike(first, n)});
    }
    return found;
  }

  void update_partly(int64_t row, const Run& run) const {
    const Matrix* const changed[] = {&p, &m, &v, &largest};
    const int64_t count = largest.data == nullptr ? 3 : 4;
    Kept kept[4];
    for (int64_t i = 0; i < count; ++i) kept[i].keep(*changed[i], row, run);
    update<1>(row, run, run.first);
    for (int64_t i = 0; i < count; ++i) kept[i].put_back(*changed[i], row, run, factor(3, run.first));
  }

  void run(const Tile<const Step*>& tile) const {
    const std::vector<Run> of_row = runs(tile.col, tile.last_col);
    for (int64_t row = tile.row; row < tile.last_row; ++row) {
      const bool columns = tensors->blocks == Blocks::columns;
      const int64_t block_of_row = tensors->blocks == Blocks::rows ? row : 0;
      for (const Run& run : of_row) {
        const int64_t block = columns ? run.first : block_of_row;
        if (run.partly)
          update_partly(row, run);
        else if (columns && !run.alike)
          update<1>(row, run, block);
        else if (*factor(3, block) != C(0))
          update<0>(row, run, block);
      }
    }
  }
};

template <class C>
void step(const AdamWOperands& operands) {
  const AdamW<C> options(operands.beta1, operands.beta2, operands.eps, operands.maximize);
  std::vector<Step<C>> steps;
  steps.reserve(operands.tensors.count);
  std::vector<Tile<const Step<C>*>> tiles;
  for (const AdamWTensors& tensors : operands.tensors) {
    steps.emplace_back(operands, tensors, options);
    const Matrix& p = tensors.parameter;
    add_tiles<const Step<C>*>(p, TILE, tensors.blocks == Blocks::columns ? ROWS : 1, &steps.back(), tiles);
  }
  for_tiles(tiles, [](const auto& tile) { tile.owner->run(tile); });
}

// The elements of a row [first, first + n) without their signs: what is not 0 is an element that is not 0.
template <class E>
struct Magnitudes {
  const E* from;
  int64_t stride;

  Magnitudes(const Matrix& m, int64_t row, int64_t first)
      : from(reinterpret_cast<const E*>(address(m, row, first, sizeof(E)))), stride(m.col_stride) {}

  E operator[](int64_t i) const { return E(from[i * stride] << 1); }

  bool any(int64_t n) const {
    // A gradient that touches a block mostly does so at once.
    for (int64_t first = 0, length = 16; first < n; first += length, length = BLOCK) {
      const int64_t last = std::min(first + length, n);
      E found = 0;
      if (stride == 1) {
#pragma omp simd reduction(| : found)
        for (int64_t i = first; i < last; ++i) found |= E(from[i] << 1);
      } else {
        for (int64_t i = first; i < last; ++i) found |= (*this)[i];
      }
      if (found != 0) return true;
    }
    return false;
  }
};

void set(uint8_t& flag) {
#pragma omp atomic write
  flag = 1;
}

template <class E>
void find_rows(const Matrix& g, const Tile<const BlockedGradient*>& tile, uint8_t* touched) {
  for (int64_t row = tile.row; row < tile.last_row; ++row) {
    // Mostly the first elements of a row decide: then nothing else hides how long each row takes to come from memory.
    // The next tile of this thread mostly has the rows that follow this one's.
    __builtin_prefetch(address(g, std::min(row + AHEAD, g.rows - 1), tile.col, sizeof(E)));
    if (Magnitudes<E>(g, row, tile.col).any(tile.last_col - tile.col)) set(touched[row]);
  }
}

// Until every column is known to be touched. Only the columns from the first one that is not, to the last, are looked
// at, and as far ahead as in find_rows: rows of a tile lie far apart, and each would be waited for.
template <class E>
void find_columns(const Matrix& g, const Tile<const BlockedGradient*>& tile, uint8_t* touched) {
  constexpr int64_t LINE = 64 / sizeof(E);
  const int64_t n = tile.last_col - tile.col;  // at most a block
  E found[BLOCK] = {};
  int64_t begin = 0, end = n;
  for (int64_t row = tile.row; row < tile.last_row; ++row) {
    const int64_t ahead = std::min(row + AHEAD, tile.last_row - 1);
    for (int64_t i = begin; g.col_stride == 1 && i < end; i += LINE)
      __builtin_prefetch(address(g, ahead, tile.col + i, sizeof(E)));
    const Magnitudes<E> magnitudes(g, row, tile.col);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) found[i] |= magnitudes[i];
    while (begin < end && found[begin] != 0) ++begin;
    while (begin < end && found[end - 1] != 0) --end;
    if (begin == end) break;
  }
  for (int64_t i = 0; i < n; ++i)
    if (found[i] != 0) set(touched[tile.col + i]);
}

template <class E>
void find_any(const Matrix& g, const Tile<const BlockedGradient*>& tile, uint8_t* touched) {
  for (int64_t row = tile.row; row < tile.last_row; ++row)
    if (Magnitudes<E>(g, row, tile.col).any(tile.last_col - tile.col)) return set(*touched);
}

}  // namespace

void touched_blocks(const TouchedOperands& p, const Stream&) {
  std::vector<Tile<const BlockedGradient*>> tiles;
  // Narrow tiles of columns are high: a few rows tell of all their columns.
  for (const BlockedGradient& one : p.gradients)
    add_tiles<const BlockedGradient*>(one.gradient, one.blocks == Blocks::columns ? BLOCK : TILE, 1, &one, tiles);
  for_tiles(tiles, [&](const auto& tile) {
    const BlockedGradient& one = *tile.owner;
    uint8_t* touched = p.touched + one.first;
    switch_size(one.gradient.dtype, [&](auto element) {
      using E = decltype(element);
      if (one.blocks == Blocks::rows) return find_rows<E>(one.gradient, tile, touched);
      if (one.blocks == Blocks::columns) return find_columns<E>(one.gradient, tile, touched);
      find_any<E>(one.gradient, tile, touched);
    });
  });
}

void adamw_step(const AdamWOperands& p, const Stream&) {
  if (p.tensors.count == 0) return;
  GRADROUTE_SWITCH_COMPUTE(p.tensors.data->parameter.dtype, step<C>(p));
}

}  // namespace gradroute::GRADROUTE_CPU
