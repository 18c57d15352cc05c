// Renders a component again only when `isSame` says that its properties changed. (Preact's own `memo` is in its compat layer.)
import { Component, h, type ComponentType } from "preact";

export function memo<Props extends object>(
  Inner: ComponentType<Props> | ((props: Props) => unknown),
  isSame?: (a: Props, b: Props) => boolean,
) {
  const equal =
    isSame ??
    ((a: Props, b: Props) => {
      const [left, right] = [a as Record<string, unknown>, b as Record<string, unknown>];
      return (
        Object.keys(right).length === Object.keys(left).length &&
        Object.keys(left).every((key) => left[key] === right[key])
      );
    });
  return class Memo extends Component<Props> {
    shouldComponentUpdate(next: Props): boolean {
      return !equal(this.props as Props, next);
    }
    render() {
      return h(Inner as ComponentType<Props>, this.props as Props & object);
    }
  };
}
