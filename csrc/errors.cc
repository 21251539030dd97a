#include "errors.h"

#include <cmath>
#include <cstdio>

namespace qdeploy {

void fail(const std::string& expected, const std::string& got, const std::string& where) {
  throw ModelError("expected " + expected + ", got " + got + " - at " + where);
}

void require(bool ok, const std::string& expected, const std::string& got, const std::string& where) {
  if (!ok) fail(expected, got, where);
}

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

std::string number_text(double number) {
  if (std::isnan(number)) return "nan";  // printf shows its sign
  char text[32];
  snprintf(text, sizeof text, "%.3g", number);
  return text;
}

std::string alternatives(const std::vector<std::string>& texts) {
  std::string text;
  for (size_t i = 0; i < texts.size(); ++i) text += (i == 0 ? "" : i + 1 < texts.size() ? ", " : " or ") + texts[i];
  return text;
}

}  // namespace qdeploy
