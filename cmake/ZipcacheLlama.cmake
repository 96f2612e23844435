# Imported targets of a llama.cpp built with shared libraries:
#   llama::headers (include, ggml/include, ggml/src)  llama::ggml-base  llama::ggml  llama::llama
# None is defined when the build is absent; the rooms that need it are then skipped.

set(_default ${PROJECT_SOURCE_DIR}/build/llama.cpp)
set(ZIPCACHE_LLAMA_DIR ${_default}/source CACHE PATH "Source tree of llama.cpp")
if(ZIPCACHE_LLAMA_DIR STREQUAL "${_default}/source")
  set(_build ${_default}/build)
else()
  set(_build ${ZIPCACHE_LLAMA_DIR}/build)
endif()
set(ZIPCACHE_LLAMA_BUILD_DIR ${_build} CACHE PATH "Build tree of ZIPCACHE_LLAMA_DIR")

set(_bin ${ZIPCACHE_LLAMA_BUILD_DIR}/bin)
foreach(file ${ZIPCACHE_LLAMA_DIR}/include/llama.h ${_bin}/libggml-base.so ${_bin}/libggml.so
             ${_bin}/libllama.so)
  if(NOT EXISTS ${file})
    message(STATUS "llama.cpp: not found (${file})")
    return()
  endif()
endforeach()
message(STATUS "llama.cpp: ${ZIPCACHE_LLAMA_DIR}")

add_library(llama::headers INTERFACE IMPORTED GLOBAL)
target_include_directories(llama::headers SYSTEM INTERFACE
  ${ZIPCACHE_LLAMA_DIR}/include ${ZIPCACHE_LLAMA_DIR}/ggml/include ${ZIPCACHE_LLAMA_DIR}/ggml/src)

function(_zipcache_llama_library name)
  add_library(llama::${name} SHARED IMPORTED GLOBAL)
  set_target_properties(llama::${name} PROPERTIES IMPORTED_LOCATION ${_bin}/lib${name}.so)
  target_link_libraries(llama::${name} INTERFACE llama::headers ${ARGN})
endfunction()

_zipcache_llama_library(ggml-base)
_zipcache_llama_library(ggml llama::ggml-base)
_zipcache_llama_library(llama llama::ggml)
