#include "arena.h"

#include <algorithm>
#include <numeric>

namespace qdeploy {
namespace {

// The blocks that have their place, found by their lives. A tree over all blocks in the order of their first steps,
// whose nodes know the last step of what lies below them and is placed.
class PlacedBlocks {
 public:
  explicit PlacedBlocks(const std::vector<Block>& blocks) : blocks_(blocks), by_first_(blocks.size()) {
    std::iota(by_first_.begin(), by_first_.end(), 0);
    std::stable_sort(by_first_.begin(), by_first_.end(),
                     [&](int a, int b) { return blocks_[a].first < blocks_[b].first; });
    rank_.resize(blocks.size());
    for (size_t i = 0; i < by_first_.size(); ++i) rank_[by_first_[i]] = i;
    while (leaves_ < blocks.size()) leaves_ *= 2;
    last_.assign(2 * leaves_, kNone);
  }

  void add(int block) {
    for (size_t node = leaves_ + rank_[block]; node > 0; node /= 2) {
      last_[node] = std::max(last_[node], blocks_[block].last);
    }
  }

  // Those that live together with `block`, at most `most` + 1 of them. Adds to `visits`.
  std::vector<int> neighbours(const Block& block, size_t most, size_t* visits) const {
    std::vector<int> found;
    std::vector<size_t> open = {1};
    while (!open.empty() && found.size() <= most) {
      const size_t node = open.back();
      open.pop_back();
      ++*visits;
      if (last_[node] < block.first || first_below(node) > block.last) continue;
      if (node >= leaves_) {
        found.push_back(by_first_[node - leaves_]);
      } else {
        open.push_back(2 * node + 1);
        open.push_back(2 * node);
      }
    }
    return found;
  }

 private:
  static constexpr int kNone = -2;  // before the first step of any life

  // The first step of the first block below a node, which has one.
  int first_below(size_t node) const {
    while (node < leaves_) node *= 2;
    return blocks_[by_first_[node - leaves_]].first;
  }

  const std::vector<Block>& blocks_;
  std::vector<int> by_first_;
  std::vector<size_t> rank_;
  size_t leaves_ = 1;
  std::vector<int> last_;  // of node 1, the root, of its children 2 and 3, and so on
};

// The lowest place for `bytes` beside blocks that are in the order of their offsets.
size_t lowest_gap(size_t bytes, const std::vector<int>& neighbours, const std::vector<Block>& blocks,
                  const std::vector<size_t>& offset) {
  size_t at = 0;
  for (const int other : neighbours) {
    if (at + bytes <= offset[other]) break;
    at = std::max(at, offset[other] + blocks[other].bytes);
  }
  return at;
}

}  // namespace

Arena place(const std::vector<Block>& blocks) {
  Arena arena;
  arena.offset.resize(blocks.size());
  std::vector<int> order(blocks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return blocks[a].bytes > blocks[b].bytes; });
  PlacedBlocks placed(blocks);
  for (const int i : order) {
    std::vector<int> neighbours = placed.neighbours(blocks[i], kMostNeighbours, &arena.visits);
    size_t at = arena.bytes;
    if (neighbours.size() <= kMostNeighbours) {
      std::sort(neighbours.begin(), neighbours.end(), [&](int a, int b) { return arena.offset[a] < arena.offset[b]; });
      at = lowest_gap(blocks[i].bytes, neighbours, blocks, arena.offset);
    }
    arena.offset[i] = at;
    arena.bytes = std::max(arena.bytes, at + blocks[i].bytes);
    placed.add(i);
  }
  return arena;
}

}  // namespace qdeploy
