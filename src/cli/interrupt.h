// Ctrl-C: the first one asks the run to stop and still print its table, the second one kills.
#pragma once

namespace zipcache::cli {

void catch_interrupts();
bool is_interrupted();

}  // namespace zipcache::cli
