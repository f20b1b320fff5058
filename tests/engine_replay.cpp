// Replays calls of the engine that engine_cases.py recorded and compares their results with the reference's.
//
//     engine_replay FILE     prints the instruction set and the number of cases; exit code 1 where a result differs
//     engine_replay FILE N   the same where one allocation of scratch fails, each in turn, in every Nth case of a function
//
// Each case runs twice: call by call on memory that a sanitizer watches, and as one list (qb_run) on memory, scratch
// included, that ends where a page ends before one that nobody may touch: that stops instructions which no sanitizer sees.
//
// The file, little-endian. A number is an int64. A list is a number n and n items; bytes are a number n and n bytes.
//
//     file      list of cases
//     case      bytes name, list of buffers, list of calls, list of results
//     buffer    number: size of an element; bytes: its content before the first call; bytes: where not empty, the name of
//               a function that tells its size instead, of this list of numbers (a packed weight)
//     call      bytes: name of the function; list of arguments; number: what it returns (0: nothing)
//     argument  number: kind, then by kind
//                 INTEGER    number
//                 REAL       float64
//                 POINTER    number: index of a buffer, -1: null
//                 STRUCTURE  number: its size; bytes, of one or several; list of pointers in them, each two numbers:
//                            offset, index of a buffer
//     result    number: index of a buffer; bytes expected; number: 1 where it holds float32, which may differ by
//               float64: tolerance (0: the same bytes, as for all else)
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "engine.h"

namespace {

[[noreturn]] void fail(const std::string& reason) {
  std::fprintf(stderr, "engine_replay: %s\n", reason.c_str());
  std::exit(2);
}

// --- reading ---------------------------------------------------------------------------------------------------------

class Reader {
 public:
  explicit Reader(std::vector<char> data) : data_(std::move(data)) {}

  template <class T>
  T value() {
    T result;
    std::memcpy(&result, take(sizeof(T)), sizeof(T));
    return result;
  }
  int64_t number() { return value<int64_t>(); }
  std::vector<char> bytes() {
    const int64_t count = number();
    const char* from = take(count);
    return std::vector<char>(from, from + count);
  }
  std::string text() {
    const std::vector<char> read = bytes();
    return std::string(read.begin(), read.end());
  }
  template <class Item>
  auto list(Item item) {
    std::vector<decltype(item())> result;
    for (int64_t left = number(); left > 0; --left) result.push_back(item());
    return result;
  }
  bool ended() const { return at_ == data_.size(); }

 private:
  const char* take(int64_t count) {
    if (count < 0 || uint64_t(count) > data_.size() - at_) fail("the file is cut off");
    at_ += count;
    return data_.data() + at_ - count;
  }

  std::vector<char> data_;
  size_t at_ = 0;
};

enum Kind : int64_t { INTEGER, REAL, POINTER, STRUCTURE };

struct Argument {
  int64_t kind = INTEGER, integer = 0;
  double real = 0;
  int64_t size = 0;  // of one structure
  std::vector<char> structure;
  struct Place {
    int64_t offset, buffer;
  };
  std::vector<Place> pointers;
};

struct Recorded {  // a buffer
  int64_t element;
  std::vector<char> content;
  std::string sized_by;
  std::vector<int64_t> sizes;
};

struct Call {
  std::string function;
  std::vector<Argument> arguments;
  int64_t returned;
};

struct Result {
  int64_t buffer;
  std::vector<char> expected;
  int64_t is_float;
  double tolerance;
};

struct Case {
  std::string name;
  std::vector<Recorded> buffers;
  std::vector<Call> calls;
  std::vector<Result> results;
};

Argument read_argument(Reader& in) {
  Argument read;
  read.kind = in.number();
  if (read.kind == REAL) {
    read.real = in.value<double>();
  } else if (read.kind == STRUCTURE) {
    read.size = in.number();
    read.structure = in.bytes();
    read.pointers = in.list([&] {
      const int64_t offset = in.number();
      return Argument::Place{offset, in.number()};
    });
  } else {
    read.integer = in.number();
  }
  return read;
}

Case read_case(Reader& in) {
  Case read;
  read.name = in.text();
  read.buffers = in.list([&] {
    Recorded buffer;
    buffer.element = in.number();
    buffer.content = in.bytes();
    buffer.sized_by = in.text();
    buffer.sizes = in.list([&] { return in.number(); });
    return buffer;
  });
  read.calls = in.list([&] {
    Call call;
    call.function = in.text();
    call.arguments = in.list([&] { return read_argument(in); });
    call.returned = in.number();
    return call;
  });
  read.results = in.list([&] {
    Result result;
    result.buffer = in.number();
    result.expected = in.bytes();
    result.is_float = in.number();
    result.tolerance = in.value<double>();
    return result;
  });
  return read;
}

// --- calling ---------------------------------------------------------------------------------------------------------

// An argument as it is handed over; `size` is that of a structure that it points to, 0 where it is none.
struct Passed {
  int64_t kind, integer;
  double real;
  void* pointer;
  size_t size;
};

template <class T>
T as(const Passed& argument) {
  if constexpr (std::is_pointer_v<T>) {
    using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
    if constexpr (std::is_class_v<Pointee>) {
      if (argument.kind != STRUCTURE || argument.size != sizeof(Pointee))
        fail("a structure of " + std::to_string(argument.size) + " bytes was recorded, engine.h has one of " +
             std::to_string(sizeof(Pointee)));
    } else if (argument.kind != POINTER) {
      fail("engine.h takes a pointer where something else was recorded");
    }
    return static_cast<T>(argument.pointer);
  } else if constexpr (std::is_floating_point_v<T>) {
    if (argument.kind != REAL) fail("engine.h takes a float where something else was recorded");
    return T(argument.real);
  } else {
    if (argument.kind != INTEGER) fail("engine.h takes an integer where something else was recorded");
    return T(argument.integer);
  }
}

// An argument as a word of qb_run.
template <class T>
uint64_t word(const Passed& argument) {
  const T value = as<T>(argument);
  uint64_t result = 0;
  std::memcpy(&result, &value, sizeof value);
  return result;
}

template <class R, class... A, size_t... I>
int64_t spread(R (*function)(A...), const std::vector<Passed>& passed, std::index_sequence<I...>) {
  if (passed.size() != sizeof...(A)) fail("engine.h takes another number of arguments than was recorded");
  if constexpr (std::is_void_v<R>)
    return function(as<A>(passed[I])...), 0;
  else
    return function(as<A>(passed[I])...);
}

// A function of engine.h as one of a list of arguments: how each is converted follows from its declaration.
struct Function {
  std::function<int64_t(const std::vector<Passed>&)> run;
  std::function<std::vector<uint64_t>(const std::vector<Passed>&)> words;
};

template <class R, class... A, size_t... I>
std::vector<uint64_t> words(const std::vector<Passed>& passed, std::index_sequence<I...>) {
  return {word<A>(passed[I])...};
}

template <class R, class... A>
Function taking_list(R (*function)(A...)) {
  using Indices = std::index_sequence_for<A...>;
  return {[function](const std::vector<Passed>& passed) { return spread(function, passed, Indices()); },
          [](const std::vector<Passed>& passed) { return words<R, A...>(passed, Indices()); }};
}

#define FUNCTION(name) {#name, taking_list(name)}
const std::map<std::string, Function> FUNCTIONS = {
    FUNCTION(qb_packed_size),    FUNCTION(qb_pack),
    FUNCTION(qb_packed_depthwise_size), FUNCTION(qb_pack_depthwise),
    FUNCTION(qb_packed_winograd_size), FUNCTION(qb_pack_winograd),
    FUNCTION(qb_winograd),
    FUNCTION(qb_layer),          FUNCTION(qb_depthwise),
    FUNCTION(qb_transposed),     FUNCTION(qb_weight_only),
    FUNCTION(qb_lstm),           FUNCTION(qb_dynamic_lstm),
    FUNCTION(qb_weight_only_lstm), FUNCTION(qb_attention),
    FUNCTION(qb_dynamic_attention), FUNCTION(qb_probabilities),
    FUNCTION(qb_weighted_values),
    FUNCTION(qb_layer_norm),     FUNCTION(qb_quantize),
    FUNCTION(qb_quantize_rows),  FUNCTION(qb_dequantize),
    FUNCTION(qb_add),            FUNCTION(qb_mul),
    FUNCTION(qb_table),          FUNCTION(qb_average),
    FUNCTION(qb_channel_affine), FUNCTION(qb_max_pool),
    FUNCTION(qb_rows),           FUNCTION(qb_copy),
    FUNCTION(qb_fill),
    FUNCTION(qb_weight_only_transposed), FUNCTION(qb_weight_only_depthwise),
};

const Function& function_of(const std::string& name) {
  const auto found = FUNCTIONS.find(name);
  if (found == FUNCTIONS.end()) fail("engine_replay.cpp does not know " + name);
  return found->second;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Memory that ends where a page ends; the next one may not be touched.
class Guarded {
 public:
  explicit Guarded(size_t size) : whole_((size + PAGE - 1) / PAGE * PAGE) {
    start_ = mmap(nullptr, whole_ + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED || mprotect(static_cast<char*>(start_) + whole_, PAGE, PROT_NONE)) fail("out of memory");
    data = static_cast<char*>(start_) + whole_ - size;
  }
  ~Guarded() { munmap(start_, whole_ + PAGE); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data;

 private:
  inline static const size_t PAGE = sysconf(_SC_PAGESIZE);
  size_t whole_;
  void* start_;
};

// The bytes of a tensor and none more. Watched: on the heap, where the sanitizer sees whatever lies beyond; shifted by one
// element they are aligned as their elements are and no better, as an activation may begin anywhere.
class Memory {
 public:
  Memory(size_t size, size_t shift, bool guarded) {
    if (guarded) {
      guarded_ = std::make_unique<Guarded>(size);
      data = guarded_->data;
    } else {
      heap_.reset(new char[size + shift]);
      data = heap_.get() + shift;
    }
  }

  char* data;

 private:
  std::unique_ptr<char[]> heap_;
  std::unique_ptr<Guarded> guarded_;
};

Memory filled(const Recorded& buffer, bool guarded) {
  if (!buffer.sized_by.empty()) {
    std::vector<Passed> sizes;
    for (const int64_t size : buffer.sizes) sizes.push_back({INTEGER, size, 0, nullptr, 0});
    return Memory(function_of(buffer.sized_by).run(sizes), 0, guarded);
  }
  Memory memory(buffer.content.size(), buffer.element, guarded);
  std::memcpy(memory.data, buffer.content.data(), buffer.content.size());
  return memory;
}

// Scratch, whose allocations the engine makes by the one form of operator new that is replaced below.
struct Scratches {
  std::mutex mutex;
  std::map<void*, std::unique_ptr<Guarded>> held;
  int64_t left = -1;                 // allocations before the one that fails; below 0: none does
  std::atomic<bool> failed = false;  // it did

  void* allocate(size_t size) {
    const std::lock_guard lock(mutex);
    if (left >= 0 && left-- == 0) {
      failed = true;
      return nullptr;
    }
    auto memory = std::make_unique<Guarded>(size);
    void* const data = memory->data;
    held[data] = std::move(memory);
    return data;
  }
  void release(void* data) {
    const std::lock_guard lock(mutex);
    held.erase(data);
  }
};
Scratches& scratches() {
  static Scratches& all = *new Scratches;  // threads may end after main
  return all;
}

}  // namespace

void* operator new(size_t size, std::align_val_t, const std::nothrow_t&) noexcept { return scratches().allocate(size); }
void operator delete(void* data, std::align_val_t) noexcept {
  if (data) scratches().release(data);
}

namespace {

// --- comparing -------------------------------------------------------------------------------------------------------

// Where a result first differs, -1: nowhere.
int64_t first_difference(const Result& result, const char* got) {
  const int64_t element = result.is_float ? sizeof(float) : 1, count = result.expected.size() / element;
  for (int64_t i = 0; i < count; ++i) {
    const char *want_at = result.expected.data() + i * element, *got_at = got + i * element;
    if (!std::memcmp(want_at, got_at, element)) continue;
    if (!result.is_float) return i;
    float a, b;
    std::memcpy(&a, want_at, sizeof a);
    std::memcpy(&b, got_at, sizeof b);
    const bool close = result.tolerance > 0 && std::fabs(double(a) - double(b)) <= result.tolerance;
    if (!close && !(std::isnan(a) && std::isnan(b))) return i;
  }
  return -1;
}

// One run of a case in its own memory.
class Replay {
 public:
  Replay(const Case& recorded, bool as_list) : case_(recorded), as_list_(as_list) {
    for (const Recorded& buffer : recorded.buffers) buffers_.push_back(filled(buffer, as_list));
  }

  // Whether all is as it should be: what is returned and the results, or that memory ran out where it was made to.
  bool run() {
    for (const Call& call : case_.calls) {
      const Function& function = function_of(call.function);
      const std::vector<Passed> passed = arguments(call);
      const void* const caller = as_list_ ? qb_caller(call.function.c_str()) : nullptr;
      errno = 0;
      const int64_t returned = caller ? in_list(caller, function.words(passed), call.returned) : function.run(passed);
      const bool short_of_memory = errno == ENOMEM;
      if (short_of_memory != scratches().failed) return wrong(call.function + " and memory that ran out");
      if (short_of_memory) return true;  // nobody goes on
      if (returned != call.returned)
        return wrong(call.function + " returned " + std::to_string(returned) + ", not " + std::to_string(call.returned));
    }
    bool good = true;
    for (const Result& result : case_.results) {
      const int64_t place = first_difference(result, buffers_.at(result.buffer).data);
      if (place >= 0)
        good = wrong("after " + case_.calls.back().function + ", element " + std::to_string(place) + " differs");
    }
    return good;
  }

 private:
  bool wrong(const std::string& what) const {
    std::fprintf(stderr, "%s: %s\n", case_.name.c_str(), what.c_str());
    return false;
  }

  void* address(int64_t index) { return index < 0 ? nullptr : buffers_.at(index).data; }

  std::vector<Passed> arguments(const Call& call) {
    std::vector<Passed> passed;
    for (const Argument& argument : call.arguments) {
      Passed one{argument.kind, argument.integer, argument.real, nullptr, size_t(argument.size)};
      if (argument.kind == POINTER) one.pointer = address(argument.integer);
      if (argument.kind == STRUCTURE) {
        structures_.emplace_back(argument.structure.size(), 0, false);
        char* const data = structures_.back().data;
        one.pointer = data;
        std::memcpy(data, argument.structure.data(), argument.structure.size());
        for (const Argument::Place& place : argument.pointers) {
          void* target = address(place.buffer);
          std::memcpy(data + place.offset, &target, sizeof target);
        }
      }
      passed.push_back(one);
    }
    return passed;
  }

  // What a list of this call alone counts: products, or nothing.
  static int64_t in_list(const void* caller, const std::vector<uint64_t>& words, int64_t returned) {
    const uint64_t counting = returned > 0 ? qb::INT8_PRODUCTS : qb::NOTHING;
    std::vector<uint64_t> list = {reinterpret_cast<uint64_t>(caller), counting, words.size()};
    list.insert(list.end(), words.begin(), words.end());
    int64_t products[2] = {};
    return qb_run(list.data(), 1, products) ? -1 : products[0];
  }

  const Case& case_;
  bool as_list_;
  std::vector<Memory> buffers_, structures_;
};

// In a thread of its own, with scratch of its own: whether a case gives what it should.
bool replay(const Case& recorded, bool as_list) {
  bool good = false;
  std::thread([&] { good = Replay(recorded, as_list).run(); }).join();
  return good;
}

// Whether a case bears that each allocation of scratch fails once, and is right when it is run again by the same thread.
bool starve(const Case& recorded) {
  bool good = true, failed = true;
  for (int64_t allocation = 0; good && failed; ++allocation)
    std::thread([&] {
      scratches().left = allocation;
      good = Replay(recorded, false).run();
      failed = scratches().failed;
      scratches().left = -1;
      scratches().failed = false;
      good = good && Replay(recorded, false).run();
    }).join();
  return good;
}

}  // namespace

int main(int count, char** words) {
  if (count != 2 && count != 3) fail("give one file, and how many cases of a function there are to one that lacks memory");
  std::ifstream file(words[1], std::ios::binary);
  if (!file) fail(std::string("cannot read ") + words[1]);
  Reader in(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
  const std::vector<Case> cases = in.list([&] { return read_case(in); });
  if (!in.ended()) fail("the file goes on after its last case");
  const int64_t step = count == 3 ? std::max(1, std::atoi(words[2])) : 1;
  int64_t ran = 0, bad = 0;
  std::map<std::string, int64_t> met;  // of the function that a case is about
  for (const Case& one : cases) {
    if (met[one.calls.back().function]++ % step) continue;
    ++ran;
    if (count == 3)
      bad += !starve(one);
    else
      for (const bool as_list : {false, true}) bad += !replay(one, as_list);
  }
  std::printf("%s: %" PRId64 " cases, %" PRId64 " failures\n", qb_isa(), ran, bad);
  return bad ? 1 : 0;
}
