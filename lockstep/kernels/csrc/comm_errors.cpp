// Words for messages, and whether a process lives.
#include <csignal>
#include <cstdio>
#include <cstring>

#include "comm_shm.h"

namespace lockstep {

std::string tag_text(uint64_t tag) {
  static const char* calls[] = {"", "barrier", "all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast", "all_to_all", "combine", "send", "largest"};
  static const char* dtypes[] = {"float32", "bfloat16", "float16", "int8", "uint8", "bool", "int16", "int32", "int64", "float64"};
  size_t call = size_t(tag >> 56), dtype = size_t(tag >> 48) & 255, bytes = size_t(tag & 0xffffffffff), detail = size_t(tag >> 40) & 255;
  if (Call(call) == Call::Step) return "operation " + std::to_string(tag >> 32) + " of a model step (detail " + std::to_string(tag & 0xffffffff) + ")";
  std::string text = call < sizeof calls / sizeof *calls ? calls[call] : "call " + std::to_string(call);
  if (Call(call) == Call::Barrier) return text;
  text += " of " + std::to_string(bytes) + " bytes";
  if (dtype < sizeof dtypes / sizeof *dtypes) text += std::string(" of ") + dtypes[dtype];
  if (detail && Call(call) == Call::Broadcast) text += " from place " + std::to_string(detail - 1);
  else if (detail && Call(call) == Call::Gather) text += " to place " + std::to_string(detail - 1);
  else if (detail) text += " in uneven shares (no. " + std::to_string(detail) + ")";
  return text;
}

std::string seconds_text(double s) {
  char text[32];
  snprintf(text, sizeof text, "%.1f s", s);
  return text;
}

// The fields of /proc/PID/stat from the state on; false where there is no such process.
static bool read_stat(int64_t pid, char& state, int64_t& birth) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
  FILE* file = fopen(path, "r");
  if (!file) return false;
  size_t n = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[n] = 0;
  char* at = strrchr(text, ')');  // the name before it may hold anything
  if (!at || !at[1]) return false;
  state = at[2];
  at += 2;
  for (int field = 0; field < 19 && at; field++) at = strchr(at + 1, ' ');  // field 22 of the file, 19 after the state
  birth = at ? strtoll(at, nullptr, 10) : 0;
  return true;
}

int64_t process_birth(int64_t pid) {
  char state;
  int64_t birth = 0;
  return read_stat(pid, state, birth) ? birth : 0;
}

bool process_alive(int64_t pid, int64_t birth) {
  char state = 0;
  int64_t born = 0;
  if (read_stat(pid, state, born)) return state != 'Z' && state != 'X' && (!birth || born == birth);
  char self;
  if (read_stat(1, self, born)) return false;  // there is a /proc, and this process is not in it
  return kill(pid_t(pid), 0) == 0;
}

}  // namespace lockstep
