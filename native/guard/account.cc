#include "account.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <ctime>

#include "clock.h"
#include "record.h"

namespace reprieve::guard {
namespace {

constexpr std::string_view kMore = "(more was done than there was room to note)\n";

void addPadded(Line& line, uint64_t value, uint64_t least) {
  for (; least > 1 && value < least; least /= 10) line.add("0");
  line.add(value);
}

/** UTC as ISO 8601 has it. gmtime(3) is no choice: it reads the time zone's files. */
void addTime(Line& line, const timespec& time) {
  // Howard Hinnant's civil_from_days: years that begin in March, in eras of 400, put the leap day last.
  const auto seconds = static_cast<uint64_t>(time.tv_sec);
  const uint64_t days = seconds / 86400 + 719468;
  const uint64_t ofEra = days % 146097;
  const uint64_t yearOfEra = (ofEra - ofEra / 1460 + ofEra / 36524 - ofEra / 146096) / 365;
  const uint64_t ofYear = ofEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100);
  const uint64_t shifted = (5 * ofYear + 2) / 153;
  const uint64_t month = shifted < 10 ? shifted + 3 : shifted - 9;
  addPadded(line, yearOfEra + days / 146097 * 400 + (month <= 2 ? 1 : 0), 1000);
  line.add("-");
  addPadded(line, month, 10);
  line.add("-");
  addPadded(line, ofYear - (153 * shifted + 2) / 5 + 1, 10);
  line.add("T");
  addPadded(line, seconds / 3600 % 24, 10);
  line.add(":");
  addPadded(line, seconds / 60 % 60, 10);
  line.add(":");
  addPadded(line, seconds % 60, 10);
  line.add(".");
  addPadded(line, static_cast<uint64_t>(time.tv_nsec) / 1'000'000, 100);
  line.add("Z");
}

std::string_view nameOf(Reason reason) {
  switch (reason) {
    case Reason::kDied:
      return "died";
    case Reason::kSilent:
      return "silent";
    case Reason::kOverdue:
      return "overdue";
    case Reason::kLeft:
      return "left";
  }
  return "";
}

}  // namespace

Account::Account() : kernelLog_(open("/dev/kmsg", O_WRONLY | O_NONBLOCK | O_CLOEXEC)) {}

void Account::begin(std::string_view instance, pid_t handler, Reason reason, std::string_view path) {
  begun_ = clockUs();
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  Line line;
  line.add("version 1\ninstance ").add(instance).add("\nhandler ").add(static_cast<uint64_t>(handler)).add("\nat ");
  addTime(line, now);
  line.add("\nreason ").add(nameOf(reason)).add("\n");
  length_ = 0;
  full_ = false;
  put(line.view());
  if (path.empty()) return;
  put("memcg ");
  put(path);
  put("\n");
}

void Account::note(std::string_view what) {
  if (full_) return;
  Line line;
  line.add("+").add(clockUs() - begun_).add(" us ").add(what);
  if (length_ + line.view().size() + 1 + kMore.size() > text_.size()) {
    full_ = true;
    put(kMore);
    return;
  }
  const size_t from = length_;
  put(line.view());
  // Names and paths were chosen by others: none may look like a line of ours, or steer a terminal.
  std::replace_if(
      text_.data() + from, text_.data() + length_, [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
  put("\n");
}

void Account::tellKernel(std::string_view what) const {
  Line line;
  line.add("<4>reprieve-guard[").add(static_cast<uint64_t>(getpid())).add("]: ").add(what).add("\n");
  if (kernelLog_) [[maybe_unused]]
    const ssize_t written = ::write(kernelLog_.get(), line.view().data(), line.view().size());
}

int Account::write(int instance) const {
  // Without the truncation the blocks that were set aside stay, and no space has to be found now.
  const Fd file(openat(instance, "record", O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644));
  if (!file) return errno;
  const ssize_t written = pwrite(file.get(), text_.data(), length_, 0);
  if (written < 0) return errno;
  if (static_cast<size_t>(written) != length_) return EIO;
  return ftruncate(file.get(), static_cast<off_t>(length_)) == 0 ? 0 : errno;
}

int Account::publish(int instance, int base, const char* name) const {
  if (mkdirat(base, "records", 0755) != 0 && errno != EEXIST) return errno;
  const Fd records(openat(base, "records", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!records) return errno;
  return renameat(instance, "record", records.get(), name) == 0 ? 0 : errno;
}

void Account::put(std::string_view text) {
  for (const char c : text.substr(0, text_.size() - length_)) text_[length_++] = c;
}

}  // namespace reprieve::guard
