// A team of threads, and the memory they work in.
//
// Why not OpenMP: its regions end when every thread has come to the end, so where other processes want the cores
// too, one thread that is not running holds up all, and the others spin meanwhile. Here work is dealt out piece by
// piece, and only those who have taken a piece are waited for: a helper that comes late finds nothing to do.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

using Piece = void (*)(void* context, int64_t index, int thread);

// Calls piece(context, i, thread) for all i < count, on up to `threads` threads, numbered from 0 (the caller).
void run_pieces(int64_t count, int threads, Piece piece, void* context);

template <class F>
void parallel(int64_t count, int threads, F f) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) f(i, 0);
        return;
    }
    auto piece = [](void* context, int64_t i, int thread) { (*static_cast<F*>(context))(i, thread); };
    run_pieces(count, threads, piece, &f);
}

// While one lives, helpers wait for work without sleeping; behind it they sleep at once, and leave their cores to others.
class Session {
  public:
    explicit Session(int threads);
    ~Session();
    Session(const Session&) = delete;

  private:
    int threads_;
};

// Memory that is kept from call to call and grows when it must, aligned to cache lines.
class Scratch {
  public:
    template <class T>
    T* take(size_t count) {
        size_t bytes = (count * sizeof(T) + 4095) & ~size_t(4095);
        if (bytes > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(4096, bytes);
            size_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return static_cast<T*>(memory_);
    }
    ~Scratch() { std::free(memory_); }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

constexpr size_t padded(size_t count) { return (count + 15) & ~size_t(15); }
