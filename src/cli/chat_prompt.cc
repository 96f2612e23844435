#include "cli/chat_prompt.h"

#include <string_view>

namespace zipcache::cli {
namespace {

// Stands for the user's message while the template is applied; no template contains it.
constexpr std::string_view kMessagePlace = "\x01message\x01";

struct Frame {
  std::string before;
  std::string after;
};

Expected<Frame> apply_template(const char* chat_template, const std::string& system) {
  const std::string message(kMessagePlace);
  std::vector<llama_chat_message> messages;
  if (!system.empty()) {
    messages.push_back({"system", system.c_str()});
  }
  messages.push_back({"user", message.c_str()});

  std::string framed(1024 + 2 * system.size(), '\0');
  const auto call = [&] {
    return llama_chat_apply_template(chat_template, messages.data(), messages.size(),
                                     /*add_ass=*/true, framed.data(),
                                     static_cast<std::int32_t>(framed.size()));
  };
  std::int32_t n_bytes = call();
  if (n_bytes > static_cast<std::int32_t>(framed.size())) {
    framed.resize(static_cast<std::size_t>(n_bytes));
    n_bytes = call();
  }
  if (n_bytes < 0) {
    return unsupported(
        "llama.cpp does not know the chat template without its Jinja engine; pass --raw, or "
        "--chat-template NAME (chatml, llama3, gemma, ...)");
  }
  framed.resize(static_cast<std::size_t>(n_bytes));
  const std::size_t place = framed.find(kMessagePlace);
  if (place == std::string::npos) {
    return unsupported("the chat template leaves out the user's message; pass --raw");
  }
  return Frame{framed.substr(0, place), framed.substr(place + kMessagePlace.size())};
}

void append(std::vector<llama_token>& tokens, const std::vector<llama_token>& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
}

}  // namespace

Expected<std::vector<llama_token>> make_prompt(const Model& model, const PromptParts& parts) {
  Frame frame;
  const char* chat_template =
      parts.chat_template.empty() ? model.chat_template() : parts.chat_template.c_str();
  if (!parts.is_raw && chat_template != nullptr) {
    Expected<Frame> framed = apply_template(chat_template, parts.system);
    if (!framed) {
      return framed.error();
    }
    frame = std::move(*framed);
  }

  // Piece by piece: only the frame may hold control tokens, and the cut is exact.
  std::vector<llama_token> tokens = model.tokenize_frame(frame.before, /*begins_sequence=*/true);
  std::vector<llama_token> text = model.tokenize_text(parts.text);
  if (parts.max_text_tokens != 0 && text.size() > parts.max_text_tokens) {
    text.resize(parts.max_text_tokens);
  }
  append(tokens, text);
  if (!parts.question.empty()) {
    const std::string gap = parts.text.empty() ? "" : "\n\n";
    append(tokens, model.tokenize_text(gap + parts.question));
  }
  append(tokens, model.tokenize_frame(frame.after, /*begins_sequence=*/false));
  return tokens;
}

}  // namespace zipcache::cli
