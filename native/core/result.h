#pragma once

#include <cerrno>
#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace reprieve {

/** What the kernel refused: errno, the call that failed, and what it was about (may be empty). */
struct Error {
  int number;
  const char* syscall;
  std::string path;
};

/** The error of the call that has just failed. */
inline Error lastError(const char* syscall, std::string path = {}) { return {errno, syscall, std::move(path)}; }

/** A value, or the error that came instead. Ask before taking either. */
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  explicit operator bool() const { return state_.index() == 0; }
  T& operator*() { return *std::get_if<0>(&state_); }
  T* operator->() { return std::get_if<0>(&state_); }
  Error& error() { return *std::get_if<1>(&state_); }

 private:
  std::variant<T, Error> state_;
};

/** Success without a value, or an error. */
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}

  explicit operator bool() const { return !error_; }
  Error& error() { return *error_; }

 private:
  std::optional<Error> error_;
};

}  // namespace reprieve
