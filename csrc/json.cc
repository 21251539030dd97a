#include "json.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace qdeploy {
namespace {

constexpr int kMaxDepth = 16;
constexpr size_t kMaxName = 512;

int64_t checked_int(const Json& value, int64_t min, int64_t max, const std::string& where) {
  const std::string range = "an integer in [" + std::to_string(min) + ", " + std::to_string(max) + "]";
  if (!value.is_number_integer()) fail(range, value.type_name(), where);
  const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (too_large || value.get<int64_t>() < min || value.get<int64_t>() > max) fail(range, value.dump(), where);
  return value.get<int64_t>();
}

float checked_number(const Json& value, const std::string& where) {
  if (!value.is_number()) fail("a number", value.type_name(), where);
  const float number = static_cast<float>(value.get<double>());
  if (!std::isfinite(number)) fail("a finite f32", value.dump(), where);
  return number;
}

}  // namespace

std::string key_of(const std::string& key, const std::string& where) {
  return "key " + name_text(key) + " of " + where;
}

Json parse_json(const char* begin, const char* end, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // one set per open object
  auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    const bool opens = event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
    if (opens && depth >= kMaxDepth)
      fail("JSON nested at most " + std::to_string(kMaxDepth) + " deep", "deeper", where);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      fail("unique keys", "the key " + name_text(parsed.get_ref<const std::string&>()) + " twice", where);
    }
    return true;
  };
  const std::string syntax = "JSON in UTF-8 with finite numbers";
  if (std::find(begin, end, '\0') != end) fail(syntax, "something else", where);  // where the parser would stop
  try {
    return Json::parse(begin, end, check);
  } catch (const Json::exception&) {
    fail(syntax, "something else", where);
  }
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
  std::vector<float> result;
  for (const Json& entry : value) result.push_back(checked_number(entry, key_of(key, where)));
  return result;
}

const std::string& name_member(const Json& object, const char* key, const std::string& where) {
  const std::string& name = string_member(object, key, where);
  check_name(name, key_of(key, where));
  return name;
}

void check_name(const std::string& name, const std::string& where) {
  const bool printable = std::none_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
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
  std::vector<int64_t> result;
  for (const Json& entry : value) result.push_back(checked_int(entry, min, max, key_of(key, where)));
  return result;
}

}  // namespace qdeploy
