// Packing of masks for sparse tensor cores. Bound by reading the mask: no instruction set of its
// own.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "fastpie/sparse24.h"

namespace fastpie {
namespace {

constexpr std::int64_t kMaxRows = 256;
// A column goes to the latest step of extra columns that has been begun or the one before: what the
// contract promises to kernels.
constexpr std::size_t kStepGroups = kSparse24Step / 4;

// A set of rows of a tile.
struct Rows {
  std::uint64_t words[kMaxRows / 64] = {};

  void add(std::int64_t row) { words[row / 64] |= std::uint64_t{1} << (row % 64); }
  bool has(std::int64_t row) const { return words[row / 64] >> (row % 64) & 1; }
  bool empty() const { return (words[0] | words[1] | words[2] | words[3]) == 0; }
};

template <typename Function>
Rows combine(const Rows& a, const Rows& b, const Function& function) {
  Rows result;
  for (int i = 0; i < kMaxRows / 64; ++i) result.words[i] = function(a.words[i], b.words[i]);
  return result;
}
Rows operator|(const Rows& a, const Rows& b) {
  return combine(a, b, [](std::uint64_t x, std::uint64_t y) { return x | y; });
}
Rows operator&(const Rows& a, const Rows& b) {
  return combine(a, b, [](std::uint64_t x, std::uint64_t y) { return x & y; });
}
Rows without(const Rows& a, const Rows& b) {
  return combine(a, b, [](std::uint64_t x, std::uint64_t y) { return x & ~y; });
}

// Four extra columns, of which no row uses more than two.
struct ExtraGroup {
  int count = 0;
  std::int32_t columns[4];
  Rows users[4];
  Rows once, twice;  // rows that use at least one, two

  void add(std::int32_t column, const Rows& rows) {
    columns[count] = column;
    users[count++] = rows;
    twice = twice | (once & rows);
    once = once | rows;
  }
};

struct Cover {
  std::vector<ExtraGroup> groups;
  std::int64_t overfull = 0;
  std::int64_t spilled = 0;
  std::int64_t columns = 0;
};

// The extra columns of one tile.
class Covering {
 public:
  Covering(const PackSparse24Args& args, std::int64_t tile)
      : args_(args), first_(tile * args.rows), rows_(std::min(args.rows, args.filters - first_)) {}

  Cover run() {
    for (std::int64_t c = 0; c < args_.columns; c += 4) cover_group(c);
    return std::move(cover_);
  }

 private:
  void cover_group(std::int64_t c) {
    const int width = static_cast<int>(std::min<std::int64_t>(4, args_.columns - c));
    Rows three, four, missing[4];  // rows with three kept, with four, with three but for this one
    bool any = false;
    for (std::int64_t r = 0; r < rows_; ++r) {
      const bool* const keep = args_.keep + (first_ + r) * args_.columns + c;
      int kept = 0, gap = 0;
      for (int j = 0; j < width; ++j) {
        kept += keep[j];
        gap = keep[j] ? gap : j;
      }
      if (kept < 3) continue;
      any = true;
      ++cover_.overfull;
      cover_.spilled += kept - 2;
      if (kept == 4) {
        four.add(r);
      } else {
        three.add(r);
        missing[width == 4 ? gap : 3].add(r);
      }
    }
    if (!any) return;
    // The column that most rows keep, then the next.
    std::int32_t order[4] = {0, 1, 2, 3};
    std::stable_sort(order, order + width, [&](std::int32_t a, std::int32_t b) {
      return size(missing[a]) < size(missing[b]);
    });
    const auto column = [c](std::int32_t j) { return static_cast<std::int32_t>(c) + j; };
    if (four.empty() && missing[order[0]].empty()) {
      place(column(order[0]), three, {});
      return;
    }
    // Rows with three that keep both use the second where the first finds no room for them.
    const Rows must_first = four | missing[order[1]];
    const Rows must_second = four | missing[order[0]];
    const Rows either = without(three, missing[order[0]] | missing[order[1]]);
    const Rows left = place(column(order[0]), must_first, either);
    const Rows rows = must_second | left;
    if (!rows.empty()) place(column(order[1]), rows, {});
  }

  // Puts a column used by `must` and some of `may` into the first group that has room, and gives
  // the rest of `may`.
  Rows place(std::int32_t column, const Rows& must, const Rows& may) {
    ++cover_.columns;
    std::size_t at = 0;
    while (at < open_.size() && !(cover_.groups[open_[at]].twice & must).empty()) ++at;
    if (at == open_.size()) {
      const std::size_t next = cover_.groups.size();
      if (next % kStepGroups == 0 && next > kStepGroups) {  // a step begins, an older one is closed
        const auto in_closed = [next](std::size_t group) { return group < next - kStepGroups; };
        open_.erase(std::remove_if(open_.begin(), open_.end(), in_closed), open_.end());
        at = open_.size();
      }
      open_.push_back(next);
      cover_.groups.emplace_back();
    }
    ExtraGroup& group = cover_.groups[open_[at]];
    const Rows left = may & group.twice;
    group.add(column, must | without(may, left));
    if (group.count == 4) open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(at));
    return left;
  }

  static int size(const Rows& rows) {
    int count = 0;
    for (const std::uint64_t word : rows.words) count += __builtin_popcountll(word);
    return count;
  }

  const PackSparse24Args& args_;
  std::int64_t first_, rows_;
  std::vector<std::size_t> open_;  // groups with room
  Cover cover_;
};

std::int64_t extra_steps(const Cover& cover) {
  return sparse24_main_steps(4 * static_cast<std::int64_t>(cover.groups.size()));
}

// Writes one tile into the layout of the contract.
class Writer {
 public:
  Writer(std::int64_t rows, std::int32_t* order, std::uint32_t* metadata)
      : rows_(rows), order_(order), metadata_(metadata) {}

  // Group `group` of step `step` of a row holds the weights index[j] >= 0, at most two of four.
  void write(std::int64_t step, std::int64_t group, std::int64_t row,
             const std::int32_t (&index)[4]) {
    int places[2] = {0, 3};  // any two in order serve where there is none
    int count = 0;
    for (int j = 0; j < 4; ++j) {
      if (index[j] >= 0) places[count++] = j;
    }
    if (places[0] == 3) places[0] = 0;  // the last alone: second of two
    const std::int64_t block = row / 16, g = row % 8, high = row / 8 % 2;
    const std::int64_t lane = 4 * g + group % 4;
    const std::int64_t element = group / 4 * 4 + high * 2;
    std::int32_t* const out = order_ + ((step * (rows_ / 16) + block) * 32 + lane) * 8 + element;
    out[0] = index[places[0]];
    out[1] = index[places[1]];
    const std::int64_t meta_lane = 4 * g + block % 2 * 2 + group / 4;
    metadata_[(step * (rows_ / 32) + block / 2) * 32 + meta_lane] |=
        static_cast<std::uint32_t>(places[0] | places[1] << 2) << (16 * high + 4 * (group % 4));
  }

 private:
  std::int64_t rows_;
  std::int32_t* order_;
  std::uint32_t* metadata_;
};

void pack_tile(const PackSparse24Args& args, std::int64_t tile, std::int64_t step, std::int64_t end,
               std::int32_t* order, std::uint32_t* metadata, Sparse24Copy* copies) {
  const Cover cover = Covering(args, tile).run();
  std::fill(metadata + step * args.rows, metadata + end * args.rows, 0);
  Writer writer(args.rows, order, metadata);
  const std::int64_t main_steps = sparse24_main_steps(args.columns);
  const std::int64_t extra_step = step + main_steps;
  Sparse24Copy* copy = copies;
  for (std::size_t i = 0; i < cover.groups.size(); ++i) {
    for (int j = 0; j < cover.groups[i].count; ++j) {
      *copy++ = {cover.groups[i].columns[j], static_cast<std::int32_t>(4 * i) + j};
    }
  }
  std::sort(copies, copy,
            [](const Sparse24Copy& a, const Sparse24Copy& b) { return a.column < b.column; });
  std::vector<char> left(main_steps * kSparse24Step);  // of one row: kept and not spilled
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const std::int64_t filter = tile * args.rows + row;
    const std::int32_t base = static_cast<std::int32_t>(filter * args.columns);
    std::fill(left.begin(), left.end(), 0);
    if (filter < args.filters) {
      std::copy(args.keep + base, args.keep + base + args.columns, left.begin());
    }
    const auto groups = (end - extra_step) * (kSparse24Step / 4);
    for (std::int64_t i = 0; i < groups; ++i) {
      std::int32_t index[4] = {-1, -1, -1, -1};
      if (i < static_cast<std::int64_t>(cover.groups.size())) {
        const ExtraGroup& group = cover.groups[i];
        for (int j = 0; j < group.count; ++j) {
          if (!group.users[j].has(row)) continue;
          index[j] = base + group.columns[j];
          left[group.columns[j]] = 0;
        }
      }
      writer.write(extra_step + i / 8, i % 8, row, index);
    }
    for (std::int64_t c = 0; c < static_cast<std::int64_t>(left.size()); c += 4) {
      std::int32_t index[4];
      for (int j = 0; j < 4; ++j) {
        index[j] = left[c + j] ? base + static_cast<std::int32_t>(c) + j : -1;
      }
      writer.write(step + c / kSparse24Step, c % kSparse24Step / 4, row, index);
    }
  }
}

std::int64_t tile_count(const PackSparse24Args& args) {
  return (args.filters + args.rows - 1) / args.rows;
}

Status check(const PackSparse24Args& args) {
  if (args.rows < 32 || args.rows > kMaxRows || args.rows % 32 != 0) {
    return {"Expected tiles of 32 to 256 rows, in steps of 32"};
  }
  if (args.filters > 0 && args.columns > INT32_MAX / args.filters) {
    return {"Expected a layer to have < 2^31 weights"};
  }
  return {};
}

template <typename Function>
void for_each_tile(const PackSparse24Args& args, int threads, const Function& function) {
  cpu::parallel_for(
      tile_count(args), 1, threads,
      [](std::int64_t begin, std::int64_t end, void* context) {
        for (std::int64_t tile = begin; tile < end; ++tile) {
          (*static_cast<const Function*>(context))(tile);
        }
      },
      const_cast<Function*>(&function));
}

}  // namespace

Status count_sparse24(const PackSparse24Args& args, Sparse24Tile* tiles, int threads) {
  const Status status = check(args);
  if (!status.ok()) return status;
  for_each_tile(args, threads, [&](std::int64_t tile) {
    const Cover cover = Covering(args, tile).run();
    tiles[tile] = {sparse24_main_steps(args.columns) + extra_steps(cover), cover.overfull,
                   cover.spilled, cover.columns};
  });
  return {};
}

Status pack_sparse24(const PackSparse24Args& args, const std::int64_t* step_begin,
                     const std::int64_t* copy_begin, std::int32_t* order, std::uint32_t* metadata,
                     Sparse24Copy* copies, int threads) {
  const Status status = check(args);
  if (!status.ok()) return status;
  for_each_tile(args, threads, [&](std::int64_t tile) {
    pack_tile(args, tile, step_begin[tile], step_begin[tile + 1], order, metadata,
              copies + copy_begin[tile]);
  });
  return {};
}

}  // namespace fastpie
