#include "model_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "errors.h"
#include "json.h"

namespace qdeploy {
namespace {

constexpr uint64_t kMaxHeader = 100000000;
constexpr const char* kFormatVersion = "1";
constexpr size_t kMaxRank = 8;

uint64_t little_endian_u64(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

// Elements of a shape; throws where the product would not fit a file.
uint64_t checked_elements(const std::vector<int64_t>& shape, const std::string& where) {
  uint64_t n = 1;
  for (const int64_t d : shape) {
    if (__builtin_mul_overflow(n, static_cast<uint64_t>(d), &n) || n > (uint64_t{1} << 48)) {
      throw ModelError("expected a tensor that fits a file, got shape " + shape_text(shape) + " - at " + where);
    }
  }
  return n;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

std::string name_text(const std::string& name) {
  std::string text = name.substr(0, 60);
  for (char& c : text) {
    if (c < 32 || c > 126 || c == '`') c = '?';
  }
  return "`" + text + (name.size() > 60 ? "...`" : "`");
}

ModelFile::ModelFile(const std::string& path) : path_(path) {
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) throw ModelError("expected a model file, got \"" + std::string(strerror(errno)) + "\" - at " + path);
  try {
    struct stat info;
    if (fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
      throw ModelError("expected a model file, got a directory or device - at " + path);
    }
    bytes_ = static_cast<size_t>(info.st_size);
    parse();
  } catch (...) {
    close(fd_);
    throw;
  }
}

ModelFile::ModelFile(const std::string& name, const uint8_t* data, size_t bytes)
    : path_(name), data_(data), bytes_(bytes) {
  parse();
}

ModelFile::~ModelFile() {
  if (fd_ >= 0) close(fd_);
}

void ModelFile::read(uint64_t offset, size_t bytes, void* to) const {
  if (data_) {
    memcpy(to, data_ + offset, bytes);
    return;
  }
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd_, static_cast<uint8_t*>(to) + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw ModelError("expected " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + ", got " +
                       (got < 0 ? "\"" + std::string(strerror(errno)) + "\"" : "the end of a file that just shrank") +
                       " - at " + path_);
    }
    done += static_cast<size_t>(got);
  }
}

void ModelFile::parse() {
  uint8_t start[9] = {};  // length and first byte of the header
  if (bytes_ >= sizeof start) read(0, sizeof start, start);
  const uint64_t header_bytes = little_endian_u64(start);
  if (header_bytes > kMaxHeader || header_bytes % 8 != 0 || header_bytes == 0 || header_bytes > bytes_ - 8 ||
      start[8] != '{') {
    throw ModelError("expected a whole safetensors file, got " + std::to_string(bytes_) +
                     " bytes that do not hold its header - at " + path_);
  }
  std::vector<char> text(header_bytes);
  read(8, header_bytes, text.data());
  const std::string where = "the header of " + path_;
  const Json header = parse_json(text.data(), text.data() + header_bytes, where);
  if (!header.is_object())
    throw ModelError("expected an object, got " + std::string(header.type_name()) + " - at " + where);

  const auto metadata = header.find("__metadata__");
  if (metadata == header.end() || !metadata->is_object() || !metadata->contains("format") ||
      (*metadata)["format"] != "qdeploy") {
    throw ModelError("expected a file written by qdeploy.export, got another safetensors file - at " + path_);
  }
  const std::string& version = string_member(*metadata, "format_version", where);
  if (version != kFormatVersion) {
    const bool is_number = !version.empty() && version.find_first_not_of("0123456789") == std::string::npos;
    throw ModelError("expected format_version 1, got " + name_text(version) +
                     (is_number ? ", written by a newer qdeploy: upgrade" : "") + " - at " + path_);
  }
  graph_json_ = string_member(*metadata, "graph", where);

  const uint64_t data_bytes = bytes_ - 8 - header_bytes;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string at = "tensor " + name_text(name) + " of " + path_;
    const std::string& dtype = string_member(entry, "dtype", at);
    if (dtype != "U8" && dtype != "F32")
      throw ModelError("expected dtype U8 or F32, got " + name_text(dtype) + " - at " + at);
    FileTensor tensor;
    tensor.dtype = dtype == "U8" ? DType::u8 : DType::f32;
    tensor.shape = int_array(entry, "shape", 0, kMaxRank, 0, int64_t{1} << 40, at);
    const std::vector<int64_t> offsets = int_array(entry, "data_offsets", 2, 2, 0, INT64_MAX, at);
    const uint64_t begin = static_cast<uint64_t>(offsets[0]), end = static_cast<uint64_t>(offsets[1]);
    const uint64_t size = checked_elements(tensor.shape, at) * (tensor.dtype == DType::u8 ? 1 : 4);
    if (begin > end || end > data_bytes || end - begin != size) {
      throw ModelError("expected " + std::to_string(size) + " bytes inside " + std::to_string(data_bytes) + ", got [" +
                       std::to_string(begin) + ", " + std::to_string(end) + ") - at " + at);
    }
    tensor.offset = 8 + header_bytes + begin;
    tensor.bytes = end - begin;
    if (tensor.dtype == DType::f32 && tensor.offset % 4 != 0) {
      throw ModelError("expected F32 data aligned to 4 bytes, got offset " + std::to_string(begin) + " - at " + at);
    }
    ranges.emplace_back(begin, end);
    tensors_.emplace(name, std::move(tensor));
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t covered = 0;
  for (const auto& [begin, end] : ranges) {
    if (begin != covered)
      throw ModelError("expected tensors without holes or overlap, got one at " + std::to_string(begin) + " - at " +
                       path_);
    covered = end;
  }
  if (covered != data_bytes) {
    throw ModelError("expected " + std::to_string(covered) + " bytes of data, got " + std::to_string(data_bytes) +
                     " - at " + path_);
  }
}

const FileTensor& ModelFile::tensor(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                                    const std::string& where) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end())
    throw ModelError("expected tensor " + name_text(name) + ", got none of that name - at " + where);
  const FileTensor& found = it->second;
  bool same = found.dtype == dtype && found.shape.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == found.shape[i];
  if (!same) {
    const auto name_of = [](DType d) { return std::string(d == DType::u8 ? "U8 " : "F32 "); };
    throw ModelError("expected " + name_text(name) + " as " + name_of(dtype) + shape_text(shape) + ", got " +
                     name_of(found.dtype) + shape_text(found.shape) + " - at " + where);
  }
  return found;
}

}  // namespace qdeploy
