/**
 * The hooks of a spec: which run on the host, and which in the guest.
 *
 * runtime-spec, config.md "POSIX-platform Hooks": prestart, createRuntime, poststart and poststop run in the runtime's
 * namespaces and deal with the host (networks, above all): kilnd runs them. createContainer and startContainer run in
 * the container's namespaces, which are in the guest: crun runs them there. The agent refuses one whose program is not
 * there.
 */
import { KilnError } from '../errors.ts';
import { isEmpty } from './field-rules.ts';
import { type Hook, type HookMoment, hookMoments, type Spec } from './spec.ts';

const hostMoments = ['prestart', 'createRuntime', 'poststart', 'poststop'] as const satisfies readonly HookMoment[];
const guestMoments = ['createContainer', 'startContainer'] as const satisfies readonly HookMoment[];

/** A hook for kilnd to run. */
export interface HostHook {
  /** Its JSON path, for messages. */
  readonly name: string;
  readonly path: string;
  readonly args: readonly string[] | undefined;
  readonly env: readonly string[] | undefined;
  readonly timeoutMs: number | undefined;
}

export type HostHooks = Readonly<Record<(typeof hostMoments)[number], readonly HostHook[]>>;

/** The hooks that run on the host, in their order. */
export function hostHooks({ hooks }: Pick<Spec, 'hooks'>): HostHooks {
  const of = (moment: HookMoment): HostHook[] =>
    (hooks?.[moment] ?? []).map(({ path, args, env, timeout }, index) => ({
      name: `hooks.${moment}[${index}]`,
      path,
      args,
      env,
      timeoutMs: timeout === undefined ? undefined : Number(timeout) * 1000,
    }));
  return {
    prestart: of('prestart'),
    createRuntime: of('createRuntime'),
    poststart: of('poststart'),
    poststop: of('poststop'),
  };
}

/**
 * The hooks that run in the guest. Their environment is always given: crun would pass on its own in place of none.
 *
 * @throws KilnError unimplemented for a hook of a moment that is not known
 */
export function translateHooks(
  hooks: Readonly<Record<string, readonly Hook[] | undefined>>,
  path: string,
): object | undefined {
  for (const [moment, list] of Object.entries(hooks)) {
    if (isEmpty(list) || (hookMoments as readonly string[]).includes(moment)) continue;
    throw new KilnError('unimplemented', `${path}.${moment}: no such moment to run a hook at is known`);
  }
  const guestHooks = guestMoments.flatMap((moment) => {
    const list = hooks[moment] ?? [];
    return list.length === 0 ? [] : [[moment, list.map((hook) => ({ ...hook, env: hook.env ?? [] }))] as const];
  });
  return guestHooks.length === 0 ? undefined : Object.fromEntries(guestHooks);
}
