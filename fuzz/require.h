// What a fuzzer expects of every input.
#pragma once

inline void require(bool condition) {
  if (!condition) {
    __builtin_trap();
  }
}
