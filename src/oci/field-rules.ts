/**
 * The mechanism behind the translation of a spec: for each object of the spec a table that says, field by field, what
 * happens to it. A field without a rule (a later version's) is carried along; crun judges it.
 */
import { KilnError } from '../errors.ts';
import type { VolumeMount } from './binds.ts';
import { BlockDevices } from './block-devices.ts';
import type { PodOfSpec } from './pod.ts';

/** A translation of a part of a spec that speaks of nothing but itself: a process, a set of limits. */
export function partialTranslation(id: string, rootfsPath: string): Translation {
  return {
    id,
    rootfsPath,
    hostname: undefined,
    domainname: undefined,
    setsNetwork: false,
    mapsIds: false,
    bundle: '/',
    volumes: [],
    volumePath: String,
    hasMountsBelow: () => false,
    pod: undefined,
    blockDevices: new BlockDevices(
      { ociVersion: '', process: { args: [], cwd: '/' }, root: { path: '/' } },
      () => undefined,
    ),
    warnings: [],
  };
}

/** What the rules of one translation share. */
export interface Translation {
  /** The container's id. */
  readonly id: string;
  /** Where the guest has the container's root filesystem. */
  readonly rootfsPath: string;
  /** The container's hostname when the spec names none. */
  readonly hostname: string | undefined;
  /** The spec's domainname, for what must agree with it. */
  readonly domainname: string | undefined;
  /** True when linux.sysctl has parameters of the network. */
  readonly setsNetwork: boolean;
  /** True when the container has a user namespace. */
  readonly mapsIds: boolean;
  /** The bundle's directory, to which sources of bind mounts are relative. */
  readonly bundle: string;
  /** What the container gets of the host's files, in the order of its mounts. */
  readonly volumes: VolumeMount[];
  /** Where the guest has the volume of that place in `volumes`. */
  readonly volumePath: (index: number) => string;
  /** Whether the host has something mounted below a path. */
  readonly hasMountsBelow: (source: string) => boolean;
  /** Of a container of a pod. */
  readonly pod: PodOfSpec | undefined;
  /** Block devices of the host that the container gets. */
  readonly blockDevices: BlockDevices;
  /** What was left out, for the caller to log. */
  readonly warnings: string[];
}

export interface Rule {
  /** The word for it in docs/oci-spec.md. */
  readonly kind: 'keep' | 'drop' | 'refuse' | 'translate';
  /** The guest's value, or undefined to leave the field out. `path` is the field's JSON path, for messages. */
  apply(value: unknown, path: string, translation: Translation): unknown;
}

export type Rules = Readonly<Record<string, Rule>>;

/** Goes to the guest as it is. */
export const keep: Rule = { kind: 'keep', apply: (value) => value };

/** Has no meaning in the guest. With a warning when leaving it out may surprise someone. */
export function drop(warning?: string): Rule {
  return {
    kind: 'drop',
    apply: (value, path, { warnings }) => {
      if (warning !== undefined && !isEmpty(value)) warnings.push(`${path}: ${warning}`);
      return undefined;
    },
  };
}

/** Cannot be done, so it is an error, unless the value asks for nothing: absent, empty, 0 or false. */
export function refuse(reason: string, code: 'unimplemented' | 'invalid-argument' = 'unimplemented'): Rule {
  return {
    kind: 'refuse',
    apply: (value, path) => {
      if (isEmpty(value)) return undefined;
      throw new KilnError(code, `${path}: ${reason}`);
    },
  };
}

/** Anything else. The type parameter is what readBundle has checked the field to be. */
export function translate<T>(apply: (value: T, path: string, translation: Translation) => unknown): Rule {
  return { kind: 'translate', apply: (value, path, translation) => apply(value as T, path, translation) };
}

/** An object with rules of its own. */
export function nested(rules: Rules): Rule {
  return {
    kind: 'translate',
    apply: (value, path, translation) => (isObject(value) ? applyRules(rules, value, path, translation) : value),
  };
}

/** A copy of the object with each field as its rule makes it. */
export function applyRules(rules: Rules, object: object, path: string, translation: Translation): object {
  const entries = Object.entries(object).flatMap(([key, value]) => {
    const rule = Object.hasOwn(rules, key) ? rules[key] : undefined;
    const result = (rule ?? keep).apply(value, path === '' ? key : `${path}.${key}`, translation);
    return result === undefined ? [] : [[key, result] as const];
  });
  return Object.fromEntries(entries);
}

/** True for a value that asks for nothing. Go writes empty strings, lists and structs where nothing was set. */
export function isEmpty(value: unknown): boolean {
  if (Array.isArray(value)) return value.length === 0;
  if (isObject(value)) return Object.values(value).every(isEmpty);
  return value === undefined || value === '' || value === false || value === 0 || value === null;
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
