#include "model_file.h"

#include <string.h>

#include <algorithm>
#include <system_error>

#include "cpu.h"
#include "errors.h"
#include "json.h"

namespace qdeploy {
namespace {

using FileTensors = std::map<std::string, FileTensor>;

constexpr uint64_t kMaxHeader = 100000000;
constexpr uint64_t kMemoryPerHeaderByte = 32;  // as `{"a":1},` of 8 bytes takes 176 once parsed
constexpr int kFormatVersion = 4;              // the newest that this engine reads
constexpr size_t kMaxRank = 8;
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // of a tensor of the container, sizes of 0 counted as 1

uint64_t little_endian_u64(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

const char* name_of(DType dtype) { return dtype == DType::u8 ? "U8" : dtype == DType::f32 ? "F32" : "I32"; }

bool has_only(const std::string& text, const char* characters) {
  return text.find_first_not_of(characters) == std::string::npos;
}

// Bytes of a tensor; throws where the number of elements would not fit a file.
uint64_t checked_bytes(const FileTensor& tensor, const std::string& where) {
  uint64_t n = 1, elements = 1;
  for (const int64_t d : tensor.shape) {  // a size of 0 excuses no other
    const bool overflow = __builtin_mul_overflow(n, static_cast<uint64_t>(std::max<int64_t>(d, 1)), &n);
    require(!overflow && n <= kMaxElements, "a tensor that fits a file", "shape " + shape_text(tensor.shape), where);
    elements *= static_cast<uint64_t>(d);
  }
  return elements * (tensor.dtype == DType::u8 ? 1 : 4);
}

// An entry of the header; its bytes lie inside the data, which goes from data_begin to the end of the file.
FileTensor read_tensor(const Json& json, int version, uint64_t data_begin, uint64_t file_bytes,
                       const std::string& where) {
  const std::string& dtype = string_member(json, "dtype", where);
  const bool has_i32 = version >= 3;
  require(dtype == "U8" || dtype == "F32" || (has_i32 && dtype == "I32"),
          has_i32 ? "dtype U8, F32 or I32" : "dtype U8 or F32", name_text(dtype), where);
  FileTensor tensor;
  tensor.dtype = dtype == "U8" ? DType::u8 : dtype == "F32" ? DType::f32 : DType::i32;
  tensor.shape = int_array(json, "shape", 0, kMaxRank, 0, int64_t{1} << 40, where);
  const std::vector<int64_t> offsets = int_array(json, "data_offsets", 2, 2, 0, INT64_MAX, where);
  const uint64_t begin = static_cast<uint64_t>(offsets[0]), end = static_cast<uint64_t>(offsets[1]);
  const uint64_t size = checked_bytes(tensor, where), data_bytes = file_bytes - data_begin;
  require(begin <= end && end <= data_bytes && end - begin == size,
          std::to_string(size) + " bytes inside " + std::to_string(data_bytes),
          "[" + std::to_string(begin) + ", " + std::to_string(end) + ")", where);
  tensor.offset = data_begin + begin;
  tensor.bytes = end - begin;
  require(tensor.dtype == DType::u8 || tensor.offset % 4 == 0, dtype + " data aligned to 4 bytes",
          "offset " + std::to_string(begin), where);
  return tensor;
}

// The tensors must cover the data exactly.
void require_covered(const FileTensors& tensors, uint64_t data_begin, uint64_t file_bytes, const std::string& where) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& [name, tensor] : tensors) ranges.emplace_back(tensor.offset, tensor.offset + tensor.bytes);
  std::sort(ranges.begin(), ranges.end());
  uint64_t covered = data_begin;
  for (const auto& [begin, end] : ranges) {
    require(begin == covered, "tensors without holes or overlap", "one at " + std::to_string(begin - data_begin),
            where);
    covered = end;
  }
  require(covered == file_bytes, std::to_string(covered - data_begin) + " bytes of data",
          std::to_string(file_bytes - data_begin), where);
}

FileTensors read_tensors(const Json& header, int version, uint64_t data_begin, uint64_t file_bytes,
                         const std::string& path) {
  FileTensors tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string where = "tensor " + name_text(name) + " in " + path;
    tensors.emplace(name, read_tensor(entry, version, data_begin, file_bytes, where));
  }
  require_covered(tensors, data_begin, file_bytes, "the data offsets in " + path);
  return tensors;
}

// All its values are strings.
const Json& checked_metadata(const Json& header, const std::string& where) {
  const auto metadata = header.find("__metadata__");
  const bool is_ours = metadata != header.end() && metadata->is_object() && metadata->contains("format") &&
                       (*metadata)["format"] == "qdeploy";
  require(is_ours, "a file written by qdeploy.export", "another safetensors file", where);
  for (const auto& [key, value] : metadata->items()) {
    require(value.is_string(), "a string", value.type_name(), key_of(key, where));
  }
  return *metadata;
}

// The number in `format_version`, which is one that this engine reads.
int checked_version(const Json& metadata, const std::string& where) {
  const std::string expected = "format_version 1 to " + std::to_string(kFormatVersion);
  const std::string& text = string_member(metadata, "format_version", where);
  const bool is_number = !text.empty() && text.size() <= 9 && text[0] != '0' && has_only(text, "0123456789");
  if (!is_number) fail(expected, name_text(text), where);
  const int version = std::stoi(text);
  const auto needed = metadata.find("requires");
  if (version > kFormatVersion) {
    const std::string release = needed == metadata.end() ? "" : needed->get<std::string>();
    const bool is_release = !release.empty() && release.size() <= 20 && has_only(release, "0123456789.");
    fail(expected, text + ", which needs " + (is_release ? "qdeploy " + release + " or newer" : "a newer qdeploy"),
         where);
  }
  require(version == 1 || needed != metadata.end(), "the key `requires` from format_version 2 on", "none", where);
  return version;
}

}  // namespace

std::string tensor_text(DType dtype, const std::vector<int64_t>& shape) {
  return std::string(name_of(dtype)) + " " + shape_text(shape);
}

ModelFile::ModelFile(const std::string& path) : path_(path) {
  require(!path.empty(), "a path", "an empty one", "path");
  require(path.find('\0') == std::string::npos, "a path", "one with a byte 0", "path");
  try {
    file_.emplace(path);
  } catch (const std::system_error& error) {
    fail("a readable file", error.code().message(), path);
  }
  require(file_->is_regular(), "a regular file", "something else", path);
  bytes_ = static_cast<size_t>(file_->bytes());
  parse();
}

ModelFile::ModelFile(const std::string& name, const uint8_t* data, size_t bytes)
    : path_(name), data_(data), bytes_(bytes) {
  parse();
}

void ModelFile::read(uint64_t offset, size_t bytes, void* to) const {
  if (data_) {
    memcpy(to, data_ + offset, bytes);
    return;
  }
  const std::string expected = std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
  try {
    for (size_t done = 0; done < bytes;) {
      const size_t got = file_->read(offset + done, bytes - done, static_cast<uint8_t*>(to) + done);
      if (got == 0) fail(expected, "the end of a file that just shrank", path_);
      done += got;
    }
  } catch (const std::system_error& error) {
    fail(expected, "\"" + error.code().message() + "\"", path_);
  }
}

void ModelFile::parse() {
  const std::string where = "the header in " + path_;
  uint8_t start[9] = {};  // length and first byte of the header
  if (bytes_ >= sizeof start) read(0, sizeof start, start);
  const uint64_t header_bytes = little_endian_u64(start);
  const bool fits =
      header_bytes > 0 && header_bytes <= kMaxHeader && header_bytes % 8 == 0 && header_bytes <= bytes_ - 8;
  require(fits && start[8] == '{', "a whole safetensors file",
          std::to_string(bytes_) + " bytes that do not hold its header", where);
  const uint64_t memory = memory_limit("");
  require(
      header_bytes <= memory / kMemoryPerHeaderByte,
      "a header that fits the " + std::to_string(memory) + " bytes of memory",
      std::to_string(header_bytes) + " bytes, which take " + std::to_string(kMemoryPerHeaderByte) + " times as many",
      where);
  std::vector<char> text(header_bytes);
  read(8, header_bytes, text.data());
  const Json header = parse_json(text.data(), text.data() + header_bytes, where);
  require(header.is_object(), "an object", header.type_name(), where);
  const std::string metadata_where = "__metadata__ in " + path_;
  const Json& metadata = checked_metadata(header, metadata_where);
  version_ = checked_version(metadata, metadata_where);
  graph_json_ = string_member(metadata, "graph", metadata_where);
  tensors_ = read_tensors(header, version_, 8 + header_bytes, bytes_, path_);
}

const FileTensor* ModelFile::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const FileTensor& ModelFile::tensor(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                                    const std::string& where) const {
  const FileTensor* tensor = find(name);
  if (!tensor) fail("the tensor " + name_text(name), "none of that name", where);
  const FileTensor& found = *tensor;
  bool same = found.dtype == dtype && found.shape.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == found.shape[i];
  if (!same) fail(tensor_text(dtype, shape), tensor_text(found.dtype, found.shape), where);
  return found;
}

}  // namespace qdeploy
