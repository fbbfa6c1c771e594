// Scratch memory that is reused between calls.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
    // Memory for `count` values, aligned to 64 bytes; its content is undefined.
    template <class T>
    T* reserve(int64_t count) {
        const int64_t required = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        if (required > bytes) {
            std::free(data);
            data = std::aligned_alloc(64, bytes = required);
        }
        return static_cast<T*>(data);
    }
};

}  // namespace
