import type { RateLimiter, TokenBucket } from './api.ts';

/** What a device may transfer; 0 for no limit. */
export interface RateLimits {
  readonly bytesPerS: number;
  /** Requests of a disk, packets of a network card. */
  readonly opsPerS: number;
}

/**
 * Firecracker looks at a limiter each 100 ms, so a second's worth at once is as fine as need be. Undefined where there is no
 * limit.
 */
export function rateLimiter({ bytesPerS, opsPerS }: RateLimits): RateLimiter | undefined {
  if (bytesPerS === 0 && opsPerS === 0) return undefined;
  const bucket = (size: number): TokenBucket => ({ size, refill_time: 1000 });
  return {
    ...(bytesPerS === 0 ? {} : { bandwidth: bucket(bytesPerS) }),
    ...(opsPerS === 0 ? {} : { ops: bucket(opsPerS) }),
  };
}
