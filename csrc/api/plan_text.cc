#include "plan_text.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "../errors.h"
#include "../plan_rows.h"

namespace qdeploy {
namespace {

struct Column {
  bool is_number;                  // to the right, else to the left
  std::vector<std::string> cells;  // the header first
};

std::string fixed_text(double number, int digits) {
  char text[64];
  snprintf(text, sizeof text, "%.*f", digits, number);
  return text;
}

// "1,234" or "0.069"
std::string millions_text(double number) {
  if (number < 1000) return fixed_text(number, 3);
  std::string text = fixed_text(number, 0);
  for (int64_t i = static_cast<int64_t>(text.size()) - 3; i > 0; i -= 3) text.insert(static_cast<size_t>(i), ",");
  return text;
}

// Of UTF-8: every byte but those that continue a character.
size_t characters(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

std::string table_text(const std::vector<Column>& columns) {
  std::string text;
  for (size_t row = 0; row < columns[0].cells.size(); ++row) {
    std::string line;
    for (const Column& column : columns) {
      size_t width = 0;
      for (const std::string& cell : column.cells) width = std::max(width, characters(cell));
      const std::string& cell = column.cells[row];
      const std::string space(width - characters(cell), ' ');
      line += (line.empty() ? "" : "  ") + (column.is_number ? space + cell : cell + space);
    }
    line.resize(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

int64_t macs_of_image(const Program& program) {
  int64_t macs = 0;
  for (const Step& step : program.steps) macs += step.macs;
  return macs;
}

}  // namespace

std::string plan_text(Session& session, int64_t batch) {
  const Program& program = session.program();
  const int64_t total = std::max<int64_t>(1, macs_of_image(program)), most = INT64_MAX / total;
  if (batch > most) {
    throw InputError("expected at most " + std::to_string(most) + ", got " + std::to_string(batch) + " - at batch");
  }
  Column member = {false, {"member"}}, node = {false, {"node"}}, kernel = {false, {"kernel"}}, tile = {false, {"tile"}};
  Column split = {false, {"split"}}, bits = {true, {"bits"}}, mmac = {true, {"MMAC"}}, share = {true, {"of MACs"}};
  Column note = {false, {"note"}};
  bool has_note = false;
  for (const PlanRow& row : plan_rows(session, batch)) {
    const double macs = static_cast<double>(row.step->macs);
    member.cells.push_back(row.member);
    node.cells.push_back(row.step->node->name);
    kernel.cells.push_back(row.kernel);
    tile.cells.push_back(row.tile);
    split.cells.push_back(row.split);
    bits.cells.push_back(row.bits ? std::to_string(row.bits) : "-");
    mmac.cells.push_back(millions_text(static_cast<double>(row.step->macs * batch) / 1e6));
    share.cells.push_back(fixed_text(100 * macs / static_cast<double>(total), 1) + "%");
    note.cells.push_back(row.note);
    has_note |= *row.note != 0;
  }
  std::vector<Column> columns = {node, kernel, tile, split, bits, mmac, share};
  if (program.graph.members.size() > 1) columns.insert(columns.begin(), member);
  if (has_note) columns.push_back(note);
  return std::string(program.kernels->isa) + ", " + std::to_string(session.threads()) + " thread(s), batch " +
         std::to_string(batch) + "\n\n" + table_text(columns);
}

}  // namespace qdeploy
