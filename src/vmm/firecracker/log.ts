/** Firecracker's own log, whose lines go into Kiln's. */
import { printable } from '../../host/printable.ts';
import type { Logger } from '../../observe/logger.ts';
import { LineLimit } from './line-limit.ts';

/** "2026-01-31T12:00:00.000000000 [my-vm:fc_vcpu 0:WARN] words": v1.16 src/vmm/src/logger/logging.rs, with --show-level. */
const form = /^\S+ \[(?<vm>[^\]:]*):(?<thread>[^\]]*):(?<level>[A-Z]+)\] (?<words>.*)$/s;

/** Firecracker's levels as Kiln's: an error of a VMM is a warning of its host; each request is told at INFO. */
const levels: Readonly<Record<string, 'warn' | 'info' | 'debug'>> = { ERROR: 'warn', WARN: 'info' };

/** As the last line of v1.16 src/firecracker/src/main.rs tells it, and of every version since 1.2. */
const exitForm = /^Firecracker exiting (?:successfully|with error)\. exit_code=(\d+)$/;

/** From the start to the guest's write: v1.16 src/vmm/src/devices/pseudo/boot_timer.rs, with --boot-timer. */
const bootForm = /^Guest-boot-time =\s*(\d+) us\s.*?(\d+) CPU us/;

const linesPerMinute = 100;

/** How many errors are kept for an error message of ours. */
const keptErrors = 3;

export class FirecrackerLog {
  readonly #logger: Logger;
  readonly #limit = new LineLimit(linesPerMinute);
  readonly #errors: string[] = [];
  #exitCode: number | null = null;

  constructor(logger: Logger) {
    this.#logger = logger;
  }

  /** Its exit code, once it has said so. */
  get exitCode(): number | null {
    return this.#exitCode;
  }

  /** The last errors, on one line. */
  lastWords(): string {
    return this.#errors.join('; ');
  }

  #tellBoot(vm: string | undefined, [us = 0, cpuUs = 0]: readonly number[]): void {
    const times = { guestBootMs: us / 1000, guestBootCpuMs: cpuUs / 1000 };
    this.#logger.info({ vm, ...times }, "the guest's first program runs");
  }

  add(line: string): void {
    const { vm, thread, level = '', words = line } = form.exec(line)?.groups ?? {};
    const text = printable(words).trim();
    const [, code] = exitForm.exec(text) ?? [];
    const [, ...boot] = bootForm.exec(text) ?? [];
    if (code !== undefined) this.#exitCode = Number(code);
    else if (boot.length > 0) this.#tellBoot(vm, boot.map(Number));
    else if (level === 'ERROR') this.#errors.push(text);
    if (this.#errors.length > keptErrors) this.#errors.shift();
    const allowed = this.#limit.take(performance.now());
    if (allowed === 'no') return;
    this.#logger[levels[level] ?? 'debug']({ vm, thread }, `Firecracker: ${text}`);
    if (allowed === 'last') this.#logger.warn({ vm }, 'Firecracker says too much: the rest of this minute is dropped');
  }
}
