# Libraries from the system's package manager, all as imported targets:
#   Threads::Threads fmt::fmt nlohmann_json::nlohmann_json CLI11::CLI11 xxhash::xxhash zstd::zstd
#   ZLIB::ZLIB
#   GTest::gtest GTest::gtest_main benchmark::benchmark

set(CMAKE_THREAD_PREFER_PTHREAD ON)
find_package(Threads REQUIRED)

function(_zipcache_require package)
  find_package(${package} QUIET)
  if(NOT ${package}_FOUND)
    message(FATAL_ERROR "${package} is missing; tools/setup.sh installs it")
  endif()
endfunction()

# xxhash ships no CMake package on Debian 12, and the target names of zstd's vary by version.
function(_zipcache_require_library name header)
  find_path(${name}_INCLUDE_DIR ${header})
  find_library(${name}_LIBRARY ${name})
  mark_as_advanced(${name}_INCLUDE_DIR ${name}_LIBRARY)
  if(NOT ${name}_INCLUDE_DIR OR NOT ${name}_LIBRARY)
    message(FATAL_ERROR "${name} is missing; tools/setup.sh installs it")
  endif()
  add_library(${name}::${name} UNKNOWN IMPORTED GLOBAL)
  set_target_properties(${name}::${name} PROPERTIES
    IMPORTED_LOCATION "${${name}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${${name}_INCLUDE_DIR}")
endfunction()

_zipcache_require(fmt)
_zipcache_require(nlohmann_json)
_zipcache_require(CLI11)
_zipcache_require(ZLIB)
_zipcache_require_library(xxhash xxhash.h)
_zipcache_require_library(zstd zstd.h)
if(BUILD_TESTING)
  _zipcache_require(GTest)
  _zipcache_require(benchmark)
endif()
