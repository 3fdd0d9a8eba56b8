// How a C function over libtorch says that it failed: by a text that lives until the next call on its thread.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

inline thread_local std::string last_error;

template <class F>
const char* guarded(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return last_error.c_str();
}
