// Preloaded into a program, makes its ggml look like one that the plug-in was not built for.

extern "C" [[gnu::visibility("default")]] const char* ggml_version() { return "99.1.2"; }
