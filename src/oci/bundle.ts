/**
 * Reading a bundle: the folder with config.json (the OCI runtime-spec) that containerd prepares for each container.
 *
 * What is checked here are the fields that Kiln itself reads, so that the code after this point can rely on their
 * types; everything else is judged by crun in the guest.
 */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { z } from 'zod';
import { KilnError } from '../errors.ts';
import { type Integer, parseJson } from './json.ts';
import type { Process, Spec } from './spec.ts';

/** struct winsize of ioctl_tty(2) has 16 bits for each side. */
const maxTerminalSide = 0xffff;

/** No real spec comes near; a runaway one must not fill the daemon's memory. */
const maxConfigBytes = 16 * 1024 * 1024;

export interface Bundle {
  readonly dir: string;
  /** config.json's path. */
  readonly configFile: string;
  readonly spec: Spec;
  /** root.path, absolute on the host. */
  readonly rootPath: string;
}

export const integer = z.custom<Integer>((value) => typeof value === 'bigint' || Number.isSafeInteger(value), {
  error: 'expected an integer',
});
const strings = z.array(z.string());
const stringMap = z.record(z.string(), z.string());
const object = z.looseObject;

const hooks = z
  .array(
    object({
      path: z.string().startsWith('/', { error: 'expected an absolute path' }),
      args: strings.optional(),
      env: z.array(z.string().includes('=', { error: 'expected NAME=VALUE' })).optional(),
      timeout: integer.refine((seconds) => seconds > 0, { error: 'expected more than 0 seconds' }).optional(),
    }),
  )
  .optional();

const characters = integer.refine((value) => value >= 0 && value <= maxTerminalSide, {
  error: `expected 0 to ${maxTerminalSide}`,
});

const processSchema: z.ZodType<Process> = object({
  terminal: z.boolean().optional(),
  consoleSize: object({ width: characters, height: characters }).optional(),
  args: strings.min(1, { error: 'expected at least one argument' }),
  env: strings.optional(),
  cwd: z.string().startsWith('/', { error: 'expected an absolute path' }),
  user: object({
    uid: integer.optional(),
    gid: integer.optional(),
    additionalGids: z.array(integer).optional(),
  }).optional(),
  apparmorProfile: z.string().optional(),
  selinuxLabel: z.string().optional(),
  capabilities: z.record(z.string(), strings.optional()).optional(),
  rlimits: z.array(object({ type: z.string() })).optional(),
  scheduler: object({ flags: strings.optional() }).optional(),
  ioPriority: object({ priority: integer.optional() }).optional(),
});

const specSchema: z.ZodType<Spec> = object({
  ociVersion: z.string(),
  process: processSchema,
  root: object({
    path: z.string().min(1, { error: 'expected a path' }),
    readonly: z.boolean().optional(),
  }),
  hostname: z.string().optional(),
  domainname: z.string().optional(),
  mounts: z
    .array(
      object({
        // Relative ones are relative to /: deprecated, but allowed.
        destination: z.string().min(1, { error: 'expected a path' }),
        type: z.string().optional(),
        source: z.string().optional(),
        options: strings.optional(),
      }),
    )
    .optional(),
  hooks: object({
    prestart: hooks,
    createRuntime: hooks,
    createContainer: hooks,
    startContainer: hooks,
    poststart: hooks,
    poststop: hooks,
  }).optional(),
  annotations: stringMap.optional(),
  linux: object({
    namespaces: z.array(object({ type: z.string(), path: z.string().optional() })).optional(),
    devices: z
      .array(object({ path: z.string(), type: z.string(), major: integer.optional(), minor: integer.optional() }))
      .optional(),
    cgroupsPath: z.string().optional(),
    resources: object({
      devices: z
        .array(
          object({
            allow: z.boolean().optional(),
            type: z.string().optional(),
            major: integer.optional(),
            minor: integer.optional(),
            access: z.string().optional(),
          }),
        )
        .optional(),
      memory: object({ limit: integer.optional() }).optional(),
      cpu: object({ quota: integer.optional(), period: integer.optional() }).optional(),
      hugepageLimits: z.array(object({ pageSize: z.string(), limit: integer })).optional(),
      unified: stringMap.optional(),
    }).optional(),
    sysctl: stringMap.optional(),
    seccomp: object({
      flags: strings.optional(),
      syscalls: z.array(object({})).optional(),
    }).optional(),
    rootfsPropagation: z.string().optional(),
    personality: object({ flags: strings.optional() }).optional(),
    memoryPolicy: object({ mode: z.string().optional() }).optional(),
  }).optional(),
});

/**
 * Reads and checks a bundle's config.json.
 *
 * @throws KilnError invalid-argument that names the file and, where a value is wrong, its JSON path
 */
export async function readBundle(bundleDir: string): Promise<Bundle> {
  const configFile = join(bundleDir, 'config.json');
  const spec = parseSpec(readText(configFile), configFile);
  return { dir: bundleDir, configFile, spec, rootPath: resolve(bundleDir, spec.root.path) };
}

/** The spec in a config.json's text; `file` is what errors call it. Throws what `readBundle` throws. */
export function parseSpec(text: string, file: string): Spec {
  return parseWith(specSchema, text, file);
}

/** The process object in the JSON text of an exec; `source` is what errors call it. Throws what `readBundle` throws. */
export function parseProcess(text: string, source: string): Process {
  return parseWith(processSchema, text, source);
}

function parseWith<T>(schema: z.ZodType<T>, text: string, file: string): T {
  let parsed: unknown;
  try {
    parsed = parseJson(text);
  } catch (error) {
    const reason = error instanceof RangeError ? 'nested too deeply' : String(error);
    throw new KilnError('invalid-argument', `${file}: not valid JSON: ${reason}`, { cause: error });
  }
  const result = schema.safeParse(parsed);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const path = issue?.path ?? [];
  const value = path.reduce<unknown>((at, key) => (at as Record<PropertyKey, unknown> | undefined)?.[key], parsed);
  const reason = value === undefined ? 'is missing' : `${issue?.message.replace(/^Invalid input: /, '')}`;
  throw new KilnError('invalid-argument', `${file}: ${jsonPath(path)}: ${reason}`, { cause: result.error });
}

function readText(file: string): string {
  try {
    using stack = new DisposableStack();
    // O_NONBLOCK: a FIFO in the file's place must not block.
    const fd = stack.adopt(openSync(file, constants.O_RDONLY | constants.O_NONBLOCK), closeSync);
    const stat = fstatSync(fd);
    if (!stat.isFile()) throw new KilnError('invalid-argument', `${file}: not a regular file`);
    if (stat.size > maxConfigBytes) {
      throw new KilnError('invalid-argument', `${file}: ${stat.size} bytes is over the limit of ${maxConfigBytes}`);
    }
    return readFileSync(fd, 'utf8');
  } catch (error) {
    if (error instanceof KilnError) throw error;
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    const reason = code === 'ENOENT' ? 'no such file' : `cannot be read: ${String(code ?? error)}`;
    throw new KilnError('invalid-argument', `${file}: ${reason}`, { cause: error });
  }
}

/** `process.args[0]`, as in jq without the leading dot; the whole document is `$`. */
export function jsonPath(path: readonly PropertyKey[]): string {
  if (path.length === 0) return '$';
  return path
    .map((key, index) => {
      if (typeof key === 'number') return `[${key}]`;
      const name = String(key);
      if (!/^[A-Za-z_]\w*$/.test(name)) return `[${JSON.stringify(name)}]`;
      return index === 0 ? name : `.${name}`;
    })
    .join('');
}
