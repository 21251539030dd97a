// JSON from a stranger: bounded depth, no duplicate keys, and typed access whose errors name the place.
#pragma once
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace qdeploy {

using Json = nlohmann::json;

// The place of a key of the object at `where`.
std::string key_of(const std::string& key, const std::string& where);

// Parses a whole text. Throws ModelError with `where` for bad syntax, numbers that are not finite, nesting beyond 16 or
// a key that occurs twice.
Json parse_json(const char* begin, const char* end, const std::string& where);

// Typed members of an object. Each throws ModelError "expected ..., got ... - at <where>".
const Json& member(const Json& object, const char* key, const std::string& where);
const std::string& string_member(const Json& object, const char* key, const std::string& where);
const std::string& name_member(const Json& object, const char* key, const std::string& where);
int64_t int_member(const Json& object, const char* key, int64_t min, int64_t max, const std::string& where);
float number_member(const Json& object, const char* key, const std::string& where);
std::vector<float> number_array(const Json& object, const char* key, size_t size, const std::string& where);
std::vector<int64_t> int_array(const Json& object, const char* key, size_t min_size, size_t max_size, int64_t min,
                               int64_t max, const std::string& where);
// The key that holds [lo, hi], codes of u8 with lo <= hi.
std::array<uint8_t, 2> clamp_member(const Json& object, const char* key, const std::string& where);
const Json& array_member(const Json& object, const char* key, size_t max_size, const std::string& where);

// A name reaches terminals and other tools: 1 to 512 bytes, no control characters.
void check_name(const std::string& name, const std::string& where);

// Throws unless this is an object with exactly these keys: nothing that this reader does not understand is passed over.
void require_keys(const Json& object, const std::set<std::string>& keys, const std::string& where);

}  // namespace qdeploy
