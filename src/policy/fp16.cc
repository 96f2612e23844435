// fp16: every token stays as it was written. The oracle that everything else is compared with.
#include "policy/method.h"

namespace zipcache::policy {

Method fp16_method() {
  return {"fp16",
          "every token exact: no compression, for comparison",
          {},
          [](SettingReader&) {
            Policy policy;
            policy.keeps_exact = true;
            return policy;
          },
          {}};
}

}  // namespace zipcache::policy
