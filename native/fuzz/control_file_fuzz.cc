// The texts that the core reads from the kernel.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/control_file.h"
#include "core/process.h"

namespace {

void require(bool holds) {
  if (!holds) abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace reprieve;
  // A copy of just that size, so that the sanitizer sees a step beyond.
  const std::string text(reinterpret_cast<const char*>(data), size);
  const double number = parseNumber(text);
  require(std::isnan(number) || std::abs(number) <= 18446744073709551616.0 || std::isinf(number));

  constexpr std::array<std::string_view, 4> kKeys{"anon", "oom_kill_disable", "VmSwap:", "anon"};
  std::array<double, kKeys.size()> values{};
  parseFields(text, kKeys, values);
  require(std::isnan(values[0]) == std::isnan(values[3]));
  // More places than keys, and more keys than places.
  parseFields(text, std::span(kKeys).first(1), values);
  parseFields(text, kKeys, std::span(values).first(1));

  for (const Range& range : textRanges(text)) require(range.start + range.bytes >= range.start);
  return 0;
}
