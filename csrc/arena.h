// Which memory activations share: blocks that live for some of the steps, and those whose lives overlap lie apart.
#pragma once
#include <cstddef>
#include <vector>

namespace qdeploy {

struct Block {
  size_t bytes;
  int first, last;  // the steps of its life
};

struct Arena {
  std::vector<size_t> offset;  // of each block
  size_t bytes = 0;
  size_t visits = 0;  // looks at a block or at a node of the search tree: what the work is bounded by
};

// Largest first, each at the lowest place that is free during its whole life. For n blocks in O(n log n): one that meets
// more than kMostNeighbours others goes on top of everything.
Arena place(const std::vector<Block>& blocks);

// Alive at once. DenseNet-264 has 70, an ensemble of 256 members as many outputs at its end.
constexpr size_t kMostNeighbours = 512;

}  // namespace qdeploy
