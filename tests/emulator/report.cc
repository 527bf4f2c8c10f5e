#include "report.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include <execinfo.h>
#include <unistd.h>

#include "fibers.h"
#include "shared.h"

namespace emu {

std::string text(const char* format, ...) {
  char line[1000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

std::string place(void* pc) {
  // The call lies before the address that it returns to.
  void* call = static_cast<char*>(pc) - 1;
  const std::string plain = text("    at %p\n", call);
  const std::string command = text("addr2line -Cfipse /proc/%d/exe %p 2>/dev/null", getpid(), call);
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return plain;
  std::string lines;
  char line[4096];
  while (fgets(line, sizeof line, pipe) != nullptr) {
    // Of a function's name its start: templates' arguments fill whole screens.
    const std::string all = line;
    const size_t at = all.rfind(" at ");
    if (at == std::string::npos) continue;
    lines += "    " + all.substr(0, at < 80 ? at : 80) + all.substr(at);
  }
  pclose(pipe);
  return lines.empty() ? plain : lines;
}

void fail(const std::string& message) {
  static bool failing = false;
  fflush(stdout);
  fprintf(stderr, "\nemulator: %s%s", message.c_str(), message.ends_with('\n') ? "" : "\n");
  if (current >= 0) {
    fprintf(stderr, "  kernel %s, block %u, thread %d (warp %d, lane %d), turn %llu\n", kernel_name,
            blockIdx.x, current, current / 32, current % 32, static_cast<unsigned long long>(turn));
    void* frames[12];
    const int count = failing ? 0 : backtrace(frames, 12);
    failing = true;
    for (int x = 1; x < count; ++x) {
      // The kernel's own frames, if their names are known.
      const std::string lines = place(frames[x]);
      if (lines.find(".cc:") == lines.npos && lines.find(".h:") == lines.npos) {
        fputs(lines.c_str(), stderr);
      }
    }
  }
  fprintf(stderr, "%s\n", running.c_str());
  _exit(1);
}

void unsupported(const char* instruction) { fail(text("not emulated: %s", instruction)); }

std::string shared_name(uint32_t address) {
  if (address < shared_base()) return text("%#x", address);
  return text("dynamic %u", address - shared_base());
}

static void on_signal(int number, siginfo_t* info, void*) {
  fail(text("signal %d at %p: beyond a tensor, a buffer or a stack?", number, info->si_addr));
}

void catch_signals() {
  // A stack of its own: a thread's may be the one that is full.
  static char stack[1 << 18];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(number, &action, nullptr);
}

}  // namespace emu
