import { check, declare } from './libc.ts';

/** Clocks of clock_gettime(2), from linux/time.h. */
export const CLOCK_REALTIME = 0;
export const CLOCK_BOOTTIME = 7;

const NANOSECONDS = 1_000_000_000n;

// struct timespec on 64-bit Linux: two 64-bit numbers, seconds and nanoseconds.
type Arguments = [clockid: number, tp: BigInt64Array];
const cClockGettime = declare<Arguments>('int clock_gettime(int clockid, int64_t *tp)');
const cClockSettime = declare<Arguments>('int clock_settime(int clockid, const int64_t *tp)');

/** clock_gettime(2), in nanoseconds. @throws SysError */
export function clockGettime(clockid: number): bigint {
  const tp = new BigInt64Array(2);
  check(cClockGettime(clockid, tp), 'clock_gettime');
  const [seconds = 0n, nanoseconds = 0n] = tp;
  return seconds * NANOSECONDS + nanoseconds;
}

/** clock_settime(2), in nanoseconds. @throws SysError EPERM without CAP_SYS_TIME */
export function clockSettime(clockid: number, time: bigint): void {
  const tp = BigInt64Array.of(time / NANOSECONDS, time % NANOSECONDS);
  check(cClockSettime(clockid, tp), 'clock_settime');
}

/** struct timeval on 64-bit Linux: two 64-bit numbers, seconds and microseconds. */
const cAdjtime = declare<[delta: BigInt64Array, olddelta: null]>(
  'int adjtime(const int64_t *delta, int64_t *olddelta)',
);

const MICROSECONDS = 1_000_000n;

/**
 * adjtime(3): moves CLOCK_REALTIME gradually by so many nanoseconds, 0.5 ms a second, in place of what is left of an earlier
 * call. @throws SysError EPERM without CAP_SYS_TIME, EINVAL
 */
export function adjtime(delta: bigint): void {
  const microseconds = delta / 1000n;
  const tv = BigInt64Array.of(microseconds / MICROSECONDS, microseconds % MICROSECONDS);
  check(cAdjtime(tv, null), 'adjtime');
}
