// The tile registers of matrix instructions.
#pragma once

#ifdef __AMX_TILE__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

constexpr int AMX_ROWS = 16;  // rows of a tile

// The kernel grants a process the tile registers when asked.
inline bool amx_granted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// To stand before loads of tiles: compilers do not know that these read memory, and may put off what was to be stored.
inline void written() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes while it lives, then what the thread had before (oneDNN remembers what it set).
// left_bytes: of a row of the tiles 4 and 5; right_rows: of the tiles 6 and 7; left_rows: of the tiles 0 to 5;
// where products need less of them.
class Tiles {
  public:
    explicit Tiles(int left_bytes = 64, int right_rows = AMX_ROWS, int left_rows = AMX_ROWS) {
        _tile_storeconfig(&before_);
        TileConfig config;
        config.palette = 1;
        std::fill_n(config.row_bytes, 8, 64);
        std::fill_n(config.rows, 6, left_rows);
        std::fill_n(config.row_bytes + 4, 2, left_bytes);
        std::fill_n(config.rows + 6, 2, right_rows);
        _tile_loadconfig(&config);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    TileConfig before_;
};

#endif
