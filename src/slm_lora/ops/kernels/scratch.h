// Memory that is not given back, for work that is done again and again.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

struct Kept {
    void* start = nullptr;
    int64_t bytes = 0;
    Kept() = default;
    Kept(const Kept&) = delete;
    ~Kept() { std::free(start); }
    // Room for `many` values, of which nothing is known but that they can be read.
    template <class T>
    T* take(int64_t many) {
        const int64_t wanted = (many * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        if (wanted > bytes) {
            std::free(start);
            start = std::aligned_alloc(64, bytes = wanted);
        }
        return static_cast<T*>(start);
    }
};

}  // namespace
