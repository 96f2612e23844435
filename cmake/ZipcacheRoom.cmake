# How a room, its tests and its fuzzers become targets.
#
#   zipcache_room(NAME quant SOURCES a.cc b.cc DEPS base format fmt::fmt [HEADERS a.h b.h])
#   zipcache_test(NAME quant_test SOURCES a_test.cc DEPS quant ref [LABELS fast])
#   zipcache_fuzzer(NAME fuzz_header SOURCES header_fuzz.cc DEPS format [CORPUS dir])
#
# In DEPS a bare name is a room; anything else is an imported or local target. A test has one label:
# `fast` (the default) or `slow`; gtest_discover_tests cannot pass on a list of them.

# What every target of this project compiles with.
add_library(zipcache_options INTERFACE)
target_compile_features(zipcache_options INTERFACE cxx_std_20)
target_include_directories(zipcache_options INTERFACE ${PROJECT_SOURCE_DIR}/src)
# Contraction into FMA depends on the target ISA and would break "same input, same bytes".
target_compile_options(zipcache_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra>
  $<$<AND:$<BOOL:${ZIPCACHE_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)

# Turns DEPS of `target` into CMake targets; stops at a name that is neither a room nor a target.
function(_zipcache_resolve_deps out target)
  set(resolved)
  foreach(dep IN LISTS ARGN)
    if(TARGET zipcache_${dep} OR dep IN_LIST ZIPCACHE_ROOMS)
      list(APPEND resolved zipcache_${dep})
    elseif(TARGET ${dep} OR dep MATCHES "::" OR dep STREQUAL CMAKE_DL_LIBS)
      list(APPEND resolved ${dep})
    else()
      message(FATAL_ERROR "${target} depends on '${dep}', which is neither a room nor a target")
    endif()
  endforeach()
  set(${out} ${resolved} PARENT_SCOPE)
endfunction()

# The include order of the rooms is a rule of the architecture, so breaking it is an error here.
function(_zipcache_check_order room)
  list(FIND ZIPCACHE_ROOMS ${room} own)
  foreach(dep IN LISTS ARGN)
    list(FIND ZIPCACHE_ROOMS ${dep} theirs)
    if(own GREATER -1 AND theirs GREATER_EQUAL own)
      message(FATAL_ERROR "Room ${room} may not depend on ${dep}: it comes later in link order")
    endif()
  endforeach()
endfunction()

function(_zipcache_set_common target)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
endfunction()

function(zipcache_room)
  cmake_parse_arguments(ARG "" "NAME" "SOURCES;DEPS;HEADERS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "zipcache_room: NAME is missing or not understood: ${ARG_UNPARSED_ARGUMENTS}")
  endif()
  set(target zipcache_${ARG_NAME})
  _zipcache_check_order(${ARG_NAME} ${ARG_DEPS})
  _zipcache_resolve_deps(deps ${target} ${ARG_DEPS})

  if(ARG_SOURCES)
    add_library(${target} STATIC ${ARG_SOURCES})
    _zipcache_set_common(${target})
    target_link_libraries(${target} PUBLIC zipcache_options ${deps})
    set(scope PUBLIC)
  else()
    add_library(${target} INTERFACE)
    target_link_libraries(${target} INTERFACE zipcache_options ${deps})
    set(scope INTERFACE)
  endif()

  # Each header named here is also compiled alone by all_verify_interface_header_sets.
  if(ARG_HEADERS)
    target_sources(${target} ${scope}
      FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR}/src FILES ${ARG_HEADERS})
    set_target_properties(${target} PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
  endif()
endfunction()

function(zipcache_test)
  cmake_parse_arguments(ARG "" "NAME;LABELS" "SOURCES;DEPS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "zipcache_test: NAME is missing or not understood: ${ARG_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT BUILD_TESTING)
    return()
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS fast)
  endif()
  _zipcache_resolve_deps(deps ${ARG_NAME} ${ARG_DEPS})

  add_executable(${ARG_NAME} ${ARG_SOURCES})
  _zipcache_set_common(${ARG_NAME})
  target_link_libraries(${ARG_NAME} PRIVATE zipcache_options ${deps} GTest::gtest_main)
  # PRE_TEST: building does not run the tests' binaries, and a crash at start is a failed test.
  gtest_discover_tests(${ARG_NAME}
    TEST_PREFIX ${ARG_NAME}.
    DISCOVERY_MODE PRE_TEST
    DISCOVERY_TIMEOUT 60
    PROPERTIES LABELS ${ARG_LABELS})
endfunction()

# A file with LLVMFuzzerTestOneInput. The ordinary build links it to fuzz/main.cc, which replays the
# corpus, so that every input that once crashed stays a test.
function(zipcache_fuzzer)
  cmake_parse_arguments(ARG "" "NAME;CORPUS" "SOURCES;DEPS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "zipcache_fuzzer: NAME is missing or not understood: ${ARG_UNPARSED_ARGUMENTS}")
  endif()
  _zipcache_resolve_deps(deps ${ARG_NAME} ${ARG_DEPS})
  add_executable(${ARG_NAME} ${ARG_SOURCES})
  _zipcache_set_common(${ARG_NAME})
  target_link_libraries(${ARG_NAME} PRIVATE zipcache_options ${deps})
  if(ZIPCACHE_FUZZ)
    set_target_properties(${ARG_NAME} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY ${CMAKE_RUNTIME_OUTPUT_DIRECTORY}/fuzz)
    target_link_options(${ARG_NAME} PRIVATE -fsanitize=fuzzer)
    add_dependencies(zipcache_fuzzers ${ARG_NAME})
  else()
    target_sources(${ARG_NAME} PRIVATE ${PROJECT_SOURCE_DIR}/fuzz/main.cc)
    if(BUILD_TESTING)
      set(corpus ${CMAKE_CURRENT_SOURCE_DIR}/corpus/${ARG_NAME})
      if(ARG_CORPUS)
        cmake_path(ABSOLUTE_PATH ARG_CORPUS BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
                   OUTPUT_VARIABLE corpus)
      endif()
      add_test(NAME ${ARG_NAME}.corpus COMMAND ${ARG_NAME} ${corpus})
      set_tests_properties(${ARG_NAME}.corpus PROPERTIES LABELS fast)
    endif()
  endif()
endfunction()

if(BUILD_TESTING)
  include(GoogleTest)
endif()
if(ZIPCACHE_FUZZ)
  add_custom_target(zipcache_fuzzers)  # what the fuzz preset builds: nothing else needs clang
endif()
