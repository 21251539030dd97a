#include "json.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace qdeploy {
namespace {

constexpr size_t kMaxDepth = 16;
constexpr size_t kMaxName = 512;

int64_t checked_int(const Json& value, int64_t min, int64_t max, const std::string& where) {
  const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const bool fits =
      value.is_number_integer() && !too_large && value.get<int64_t>() >= min && value.get<int64_t>() <= max;
  if (!fits) {
    fail("an integer in [" + std::to_string(min) + ", " + std::to_string(max) + "]",
         value.is_number_integer() ? value.dump() : value.type_name(), where);
  }
  return value.get<int64_t>();
}

float checked_number(const Json& value, const std::string& where) {
  if (!value.is_number()) fail("a number", value.type_name(), where);
  const float number = static_cast<float>(value.get<double>());
  if (!std::isfinite(number)) fail("a finite f32", number_text(value.get<double>()), where);
  return number;
}

const char* const kSyntax = "JSON in UTF-8 with finite numbers";

// Builds the value that the parser reads. The library's own parser with a callback walks through all earlier siblings
// at the end of every object: 10 s for 200,000 of them.
class JsonBuilder : public nlohmann::json_sax<Json> {
 public:
  explicit JsonBuilder(const std::string& where) : where_(where) {}
  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(int64_t value) override { return add(value); }
  bool number_unsigned(uint64_t value) override { return add(value); }
  bool number_float(double value, const std::string&) override { return add(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(Json::binary_t& value) override { return add(std::move(value)); }  // no text has one
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& key) override {
    const auto [entry, is_new] = open_.back()->emplace(key, nullptr);
    require(is_new, "unique keys", "the key " + name_text(key) + " twice", where_);
    value_ = &*entry;
    return true;
  }
  bool parse_error(size_t, const std::string&, const Json::exception&) override {
    fail(kSyntax, "something else", where_);
  }

 private:
  // In the innermost open array, or as the value of the last key.
  bool add(Json value) {
    if (!open_.empty() && open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      value_ = &open_.back()->back();
    } else {
      *value_ = std::move(value);
    }
    return true;
  }
  bool open(Json container) {
    require(open_.size() < kMaxDepth, "JSON nested at most " + std::to_string(kMaxDepth) + " deep", "deeper", where_);
    add(std::move(container));
    open_.push_back(value_);
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  Json root_;
  Json* value_ = &root_;
  std::vector<Json*> open_;  // none moves before it is closed: only the innermost grows
};

}  // namespace

std::string key_of(const std::string& key, const std::string& where) {
  return "key " + name_text(key) + " of " + where;
}

Json parse_json(const char* begin, const char* end, const std::string& where) {
  // The parser would stop at a byte 0, and pass over the mark that some editors put before UTF-8.
  const bool has_zero = std::find(begin, end, '\0') != end, has_mark = begin != end && *begin == '\xef';
  if (has_zero || has_mark) fail(kSyntax, "something else", where);
  JsonBuilder builder(where);
  Json::sax_parse(begin, end, &builder);
  return builder.take();
}

const Json& member(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) fail("an object", object.type_name(), where);
  const auto it = object.find(key);
  if (it == object.end()) fail("the key `" + std::string(key) + "`", "none", where);
  return *it;
}

const std::string& string_member(const Json& object, const char* key, const std::string& where) {
  const Json& value = member(object, key, where);
  if (!value.is_string()) fail("a string", value.type_name(), key_of(key, where));
  return value.get_ref<const std::string&>();
}

int64_t int_member(const Json& object, const char* key, int64_t min, int64_t max, const std::string& where) {
  return checked_int(member(object, key, where), min, max, key_of(key, where));
}

float number_member(const Json& object, const char* key, const std::string& where) {
  return checked_number(member(object, key, where), key_of(key, where));
}

std::vector<float> number_array(const Json& object, const char* key, size_t size, const std::string& where) {
  const Json& value = array_member(object, key, size, where);
  if (value.size() != size) {
    fail(std::to_string(size) + " numbers", std::to_string(value.size()), key_of(key, where));
  }
  const std::string place = key_of(key, where);
  std::vector<float> result;
  for (const Json& entry : value) result.push_back(checked_number(entry, place));
  return result;
}

const std::string& name_member(const Json& object, const char* key, const std::string& where) {
  const std::string& name = string_member(object, key, where);
  check_name(name, key_of(key, where));
  return name;
}

void check_name(const std::string& name, const std::string& where) {
  bool printable = true;
  unsigned char before = 0;
  for (const unsigned char c : name) {  // U+0080 to U+009F are c2 80 to c2 9f
    if (c < 0x20 || c == 0x7f || (before == 0xc2 && c < 0xa0)) printable = false;
    before = c;
  }
  if (!printable || name.empty() || name.size() > kMaxName) {
    fail("a name of 1 to 512 bytes without control characters", name_text(name), where);
  }
}

void require_keys(const Json& object, const std::set<std::string>& keys, const std::string& where) {
  if (!object.is_object()) fail("an object", object.type_name(), where);
  for (const auto& [key, value] : object.items()) {
    if (!keys.count(key)) fail("no keys but the known ones", name_text(key), where);
  }
  for (const std::string& key : keys) member(object, key.c_str(), where);
}

const Json& array_member(const Json& object, const char* key, size_t max_size, const std::string& where) {
  const Json& value = member(object, key, where);
  if (!value.is_array()) fail("an array", value.type_name(), key_of(key, where));
  if (value.size() > max_size) {
    fail("at most " + std::to_string(max_size) + " entries", std::to_string(value.size()), key_of(key, where));
  }
  return value;
}

std::vector<int64_t> int_array(const Json& object, const char* key, size_t min_size, size_t max_size, int64_t min,
                               int64_t max, const std::string& where) {
  const Json& value = array_member(object, key, max_size, where);
  if (value.size() < min_size) {
    fail("at least " + std::to_string(min_size) + " entries", std::to_string(value.size()), key_of(key, where));
  }
  const std::string place = key_of(key, where);
  std::vector<int64_t> result;
  for (const Json& entry : value) result.push_back(checked_int(entry, min, max, place));
  return result;
}

std::array<uint8_t, 2> clamp_member(const Json& object, const char* key, const std::string& where) {
  const std::vector<int64_t> clamp = int_array(object, key, 2, 2, 0, 255, where);
  require(clamp[0] <= clamp[1], "clamp [lo, hi] with lo <= hi", shape_text(clamp), where);
  return {static_cast<uint8_t>(clamp[0]), static_cast<uint8_t>(clamp[1])};
}

}  // namespace qdeploy
