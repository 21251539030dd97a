// The container: a safetensors file and its checked header (docs/format.md section 1).
//
// The file is read in pieces, not mapped: one that another process cuts short while it is being loaded is then an error
// instead of a SIGBUS, and no page of it counts as memory of this process: 53 MiB at the peak instead of 73 for
// ResNet-50, of which 25 are numpy.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "os.h"

namespace qdeploy {

enum class DType { u8, f32, i32 };

struct FileTensor {
  DType dtype;
  std::vector<int64_t> shape;
  uint64_t offset;  // in the file
  size_t bytes;
};

class ModelFile {
 public:
  // Opens the file and checks its header. Throws ModelError for anything that is not a well-formed qdeploy file.
  explicit ModelFile(const std::string& path);
  // The same for bytes in memory, which must outlive this object; `name` stands for the path in errors.
  ModelFile(const std::string& name, const uint8_t* data, size_t bytes);
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  const std::string& path() const { return path_; }
  size_t bytes() const { return bytes_; }
  int version() const { return version_; }  // of the format
  const std::string& graph_json() const { return graph_json_; }

  // Null where there is none of this name.
  const FileTensor* find(const std::string& name) const;
  // The named tensor; `where` (a node) completes the error when it is missing or of another type or shape.
  // A shape entry of -1 matches any size.
  const FileTensor& tensor(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                           const std::string& where) const;

  // Copies [offset, offset + bytes), which lie inside the file as it was opened. Throws ModelError where the file ends
  // earlier by now. Any number of threads may read at once.
  void read(uint64_t offset, size_t bytes, void* to) const;

 private:
  void parse();

  std::string path_;
  const uint8_t* data_ = nullptr;  // or, where the content is not in memory,
  std::optional<os::File> file_;
  size_t bytes_ = 0;
  int version_ = 0;
  std::map<std::string, FileTensor> tensors_;
  std::string graph_json_;
};

// "F32 [64]", in errors.
std::string tensor_text(DType dtype, const std::vector<int64_t>& shape);

}  // namespace qdeploy
