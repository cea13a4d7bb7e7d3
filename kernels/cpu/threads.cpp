#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <mutex>

namespace {

// How long a helper looks for work before it sleeps, outside of a session: longer than the gaps between the calls of
// a step, so that it is awake through one, and short enough to leave the core to others between steps.
constexpr int64_t SPIN_CYCLES = 200000;

struct Job {
    Piece piece;
    void* context;
    int64_t count;
    int threads;
};

class Team {
  public:
    // One job at a time; a caller that finds the team busy works alone.
    void run(const Job& job) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            for (int64_t i = 0; i < job.count; ++i) job.piece(job.context, i, 0);
            return;
        }
        while (helpers_ < job.threads - 1 && start_helper()) {
        }
        job_ = job;
        next_.store(0, std::memory_order_relaxed);
        // From here helpers may enter; an odd epoch is an open job.
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) wake(job.threads - 1);
        work(0);
        // Close the door, and wait for those inside.
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        for (int i = 0; inside_.load(std::memory_order_seq_cst); ++i) i < 2000 ? _mm_pause() : nap();
    }

    // A session: helpers stay awake from begin to end, and sleep at once behind it. Sessions may overlap.
    void begin(int threads) {
        sessions_.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) wake(threads - 1);
    }
    void end() { sessions_.fetch_sub(1, std::memory_order_seq_cst); }

  private:
    std::mutex turn_;
    Job job_{};
    int helpers_ = 0;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int> sessions_{0};

    void work(int thread) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job_.count;)
            job_.piece(job_.context, i, thread);
    }

    // A helper's core was taken from it in the middle of a piece: offer it this one.
    static void nap() {
        timespec time{0, 20000};
        nanosleep(&time, nullptr);
    }

    void wake(int count) { syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }

    bool start_helper();

    void help(int thread) {
        for (uint32_t seen = 0;;) {
            uint32_t epoch = wait_for_change(seen);
            seen = epoch;
            if (epoch % 2 == 0) continue;
            inside_.fetch_add(1, std::memory_order_seq_cst);
            if (epoch_.load(std::memory_order_seq_cst) == epoch && thread < job_.threads) work(thread);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    uint32_t wait_for_change(uint32_t seen) {
        uint64_t start = __rdtsc();
        for (bool in_session = false;;) {
            uint32_t epoch = epoch_.load(std::memory_order_acquire);
            if (epoch != seen) return epoch;
            bool was_in_session = in_session;
            in_session = sessions_.load(std::memory_order_relaxed) > 0;
            bool patient = in_session || (!was_in_session && int64_t(__rdtsc() - start) < SPIN_CYCLES);
            if (!patient && epoch % 2 == 0) {
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                syscall(SYS_futex, &epoch_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                start = __rdtsc();
            }
            _mm_pause();
        }
    }

    struct Start {
        Team* team;
        int thread;
    };
};

bool Team::start_helper() {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    auto* start = new Start{this, helpers_ + 1};
    pthread_t thread;
    auto entry = [](void* argument) -> void* {
        Start start = *static_cast<Start*>(argument);
        delete static_cast<Start*>(argument);
        start.team->help(start.thread);
        return nullptr;
    };
    // Signals are for the threads that know what to do with them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(&thread, &attributes, entry, start) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (started) ++helpers_;
    else delete start;
    return started;
}

std::atomic<Team*> current{nullptr};

Team& team() {
    if (Team* known = current.load(std::memory_order_acquire)) return *known;
    static std::mutex guard;
    std::lock_guard<std::mutex> lock(guard);
    if (!current.load(std::memory_order_relaxed)) {
        // Threads do not survive a fork: a child makes its own team.
        static int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
        (void)registered;
        current.store(new Team, std::memory_order_release);
    }
    return *current.load(std::memory_order_relaxed);
}

}  // namespace

Session::Session(int threads) : threads_(threads) {
    if (threads_ > 1) team().begin(threads_);
}

Session::~Session() {
    if (threads_ > 1) team().end();
}

void run_pieces(int64_t count, int threads, Piece piece, void* context) {
    team().run({piece, context, count, threads});
}
