import { arch } from 'node:process';
import { check, declare } from './libc.ts';

/** Numbers of system calls without a function in every C library; asm/unistd_64.h, and asm-generic/unistd.h for arm64. */
const numbers = arch === 'arm64' ? { ioprioSet: 30, schedSetattr: 274 } : { ioprioSet: 251, schedSetattr: 314 };

/** Policies of sched(7), from linux/sched.h. */
export const schedulingPolicies = {
  SCHED_OTHER: 0,
  SCHED_FIFO: 1,
  SCHED_RR: 2,
  SCHED_BATCH: 3,
  SCHED_IDLE: 5,
  SCHED_DEADLINE: 6,
} as const;

/** Flags of sched_setattr(2), from linux/sched.h. */
export const schedulingFlags = {
  SCHED_FLAG_RESET_ON_FORK: 0x01,
  SCHED_FLAG_RECLAIM: 0x02,
  SCHED_FLAG_DL_OVERRUN: 0x04,
  SCHED_FLAG_KEEP_POLICY: 0x08,
  SCHED_FLAG_KEEP_PARAMS: 0x10,
} as const;

/** Classes of ioprio_set(2), from linux/ioprio.h. */
export const ioPriorityClasses = { IOPRIO_CLASS_RT: 1, IOPRIO_CLASS_BE: 2, IOPRIO_CLASS_IDLE: 3 } as const;

const IOPRIO_WHO_PROCESS = 1;
const IOPRIO_CLASS_SHIFT = 13;

/** struct sched_attr in its first version, sched_setattr(2). */
const SCHED_ATTR_SIZE = 48;

const cSchedSetattr = declare<[number: number, pid: number, attr: Uint8Array, flags: number]>(
  'int syscall(long number, int pid, uint8_t *attr, unsigned int flags)',
);
const cIoprioSet = declare<[number: number, which: number, who: number, ioprio: number]>(
  'int syscall(long number, int which, int who, int ioprio)',
);

export interface SchedulingAttributes {
  readonly policy: number;
  readonly flags: number;
  readonly nice: number;
  /** 1 to 99 for the real-time policies, else 0. */
  readonly priority: number;
  /** Nanoseconds, for SCHED_DEADLINE; else 0. */
  readonly runtime: bigint;
  readonly deadline: bigint;
  readonly period: bigint;
}

/** sched_setattr(2) for one process; what it starts inherits it. @throws SysError */
export function schedSetattr(pid: number, attributes: SchedulingAttributes): void {
  const attr = Buffer.alloc(SCHED_ATTR_SIZE);
  attr.writeUInt32LE(SCHED_ATTR_SIZE, 0);
  attr.writeUInt32LE(attributes.policy, 4);
  attr.writeBigUInt64LE(BigInt(attributes.flags), 8);
  attr.writeInt32LE(attributes.nice, 16);
  attr.writeUInt32LE(attributes.priority, 20);
  attr.writeBigUInt64LE(attributes.runtime, 24);
  attr.writeBigUInt64LE(attributes.deadline, 32);
  attr.writeBigUInt64LE(attributes.period, 40);
  check(cSchedSetattr(numbers.schedSetattr, pid, attr, 0), 'sched_setattr', `pid ${pid}`);
}

/** ioprio_set(2) for one process; what it starts inherits it. `level` is 0 (first) to 7. @throws SysError */
export function ioprioSet(pid: number, ioClass: number, level: number): void {
  const ioprio = (ioClass << IOPRIO_CLASS_SHIFT) | level;
  check(cIoprioSet(numbers.ioprioSet, IOPRIO_WHO_PROCESS, pid, ioprio), 'ioprio_set', `pid ${pid}`);
}
