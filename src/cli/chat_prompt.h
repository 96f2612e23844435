// The tokens a model reads: the user's text and question inside the model's chat template.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/expected.h"
#include "cli/model.h"

namespace zipcache::cli {

struct PromptParts {
  std::string text;                 // a document, may be empty
  std::string question;             // follows the text, may be empty
  std::string system;               // "" = none; only with a template
  std::size_t max_text_tokens = 0;  // the text is cut to its first tokens; 0 = all
  bool is_raw = false;              // no template, to be continued as it stands
  std::string chat_template;        // a template of llama.cpp's by name; "" = the model's own
};

// An error when the template is not one that llama.cpp knows.
Expected<std::vector<llama_token>> make_prompt(const Model& model, const PromptParts& parts);

}  // namespace zipcache::cli
