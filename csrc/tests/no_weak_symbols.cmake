# Fails when an object file defines a weak or unique symbol: cmake -DNM=nm "-DOBJECTS=a.o;b.o" -P no_weak_symbols.cmake
foreach(OBJECT IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only -C ${OBJECT} OUTPUT_VARIABLE SYMBOLS COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]*" WEAK "${SYMBOLS}")
  if(WEAK)
    message(FATAL_ERROR "${OBJECT} defines symbols that another instruction set may replace: ${WEAK}")
  endif()
endforeach()
